"""What resumes: the files of a training state and every rank's random generators.

How weights and moments lie over the ranks belongs to the optimizer's room.
"""

"""Pages that a browser or a printer shows: each one file, without a script and with nothing beside it."""

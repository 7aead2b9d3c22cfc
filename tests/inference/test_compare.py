"""Tables fit an 80-column terminal and say what changed."""

from graftwork.inference import compare, side_by_side
from graftwork.inference.compare import confusion

BEFORE = {
    "rows": 200, "answer_tokens": 400, "loss": 4.2171, "exact_match": 0.045, "dropped": 0, "accuracy": 0.797,
    "labels": {"negative": {"rows": 98, "recall": 0.9, "precision": 0.7}, "positive": {"rows": 102, "recall": 0.7,
               "precision": 0.9}},
    "confusion": {"negative": {"negative": 88, "positive": 10}, "positive": {"negative": 31, "positive": 71}},
}  # fmt: skip
AFTER = BEFORE | {
    "loss": 0.1234, "exact_match": 0.905, "accuracy": 0.905,
    "labels": {"negative": {"rows": 98, "recall": 0.92, "precision": 0.9}, "positive": {"rows": 102, "recall": None,
               "precision": None}},
}  # fmt: skip
GOLDEN = """\
200 held-out rows

                             base   adapted   change
 ───────────────────────────────────────────────────
 loss per answer token      4.217     0.123   -4.094
 exact match                4.5 %    90.5 %    +86.0
 accuracy, 2-way           79.7 %    90.5 %    +10.8
   'negative' (98 rows)    90.0 %    92.0 %     +2.0
   'positive' (102 rows)   70.0 %         -
"""


def test_two_evaluations():
    assert compare(BEFORE, AFTER) == GOLDEN


def test_open_answers_have_no_accuracy():
    names = ("rows", "loss", "exact_match")
    text = compare({n: BEFORE[n] for n in names}, {n: AFTER[n] for n in names}, names=("lora", "all four"))
    assert "accuracy" not in text and "all four" in text


def test_confusions():
    text = confusion(BEFORE)
    assert [line.split() for line in text.splitlines()[-2:]] == [["negative", "88", "10"], ["positive", "31", "71"]]


def test_answers_side_by_side_fit_80_columns_and_keep_odd_text():
    long = "a [b]film[/b] that is\n" + "very " * 60 + ":smile: long"
    before = [{"input": long, "output": "x" * 300, "expected": "positive"}, {"input": "dull", "output": ""}]
    after = [{**before[0], "output": "positive"}, {"input": "dull", "output": "negative", "expected": "positive"}]
    text = side_by_side(before, after)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "[b]film[/b]" in text and "positive ✓" in text and "negative ✗" in text
    assert "expected" not in side_by_side(before[1:], [{"input": "dull", "output": "fine"}])

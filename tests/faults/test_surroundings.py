"""What is computed and written does not depend on the machine's locale, time zone or clock."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from pathlib import Path
from graftwork.data import SFTDataModule
from graftwork.inference.output import write_jsonl
from graftwork.peft import LoRA
from tests.helpers import tiny_run

out, data = map(Path, sys.argv[1:])
model = tiny_run.model()
model.configure_model()
model.add_adapter(LoRA("café", dim=2))
model.save_adapters(out / "adapter")
rows = SFTDataModule(
    str(data / "rows.jsonl"), tokenizer=str(data / "tokenizer"), cache_dir=str(out / "cache"),
    prompt_template="é {input}", global_batch_size=1,
)
batch = next(iter(rows.train_dataloader()))
write_jsonl(str(out / "rows.jsonl"), [{"tokens": batch.tokens.tolist(), "text": "é 漢"}])
"""
MACHINES = {
    "utf8": {"LC_ALL": "C.utf8", "TZ": "UTC"},
    "ascii": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TZ": "Pacific/Kiritimati"},
}


@pytest.mark.fault(
    "another locale changes what is read, or loses a finished run when its adapter is written",
    "every text file is UTF-8 by name; two machines write the same bytes",
)
@pytest.mark.processes
@pytest.mark.slow
def test_two_machines_write_the_same_bytes(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path / "data" / "tokenizer", 301)
    (tmp_path / "data" / "rows.jsonl").write_text('{"input": "é", "output": "漢"}\n', encoding="utf-8")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    written = []
    for machine, environment in MACHINES.items():
        out = tmp_path / machine
        out.mkdir()
        arguments = [sys.executable, str(program), str(out), str(tmp_path / "data")]
        surroundings = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(arguments, env=surroundings, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        files = [out / "rows.jsonl", *sorted((out / "adapter").iterdir())]
        written.append({file.name: file.read_bytes() for file in files})
    assert len(written[0]) == 5 and written[0] == written[1]
    assert "café" in written[0]["README.md"].decode()

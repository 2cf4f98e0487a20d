"""What results folders have in common, whoever made them and however: for the scripts beside this."""

import csv
import json
import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "crates/models/tests/fixtures/llama3"
TOKENIZER = ROOT / "crates/cli/tests/fixtures/tokenizer.json"

# Beside the experiments; how they come about differs from run to run.
OWN = {".clone"}


def fail(message):
    sys.exit(f"{Path(sys.argv[0]).name}: {message}")


def binary(named):
    """The binary to test: the one named, or the one that was built last as `cargo build` does."""
    built = [ROOT / "target" / profile / "minicache" for profile in ("debug", "release")]
    found = named or next((str(path) for path in built if path.is_file()), None)
    if found is None:
        fail("no binary; run `cargo build --bin minicache` first")
    return str(Path(found).resolve())


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MINICACHE_", "SLURM_"))}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def make_model(folder, mark=None):
    """A tiny model with random weights; with a mark one that counts as another."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MODEL / name, folder / name)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    if mark is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "transformers_version": mark}))


def is_timing(column):
    return column in ("seconds", "ms") or column.endswith(("_seconds", "_ms", "_per_s"))


def rows(path):
    """The rows of a `cells.csv`, without times."""
    with open(path, newline="") as file:
        return [{c: v for c, v in row.items() if not is_timing(c)} for row in csv.DictReader(file)]


def contents(results):
    """What has to be the same in two results folders, by file."""
    found = {}
    for path in sorted(Path(results).rglob("*")):
        name = str(path.relative_to(results))
        if path.is_dir() or name in OWN:
            continue
        if path.name == "cells.csv":
            found[name] = rows(path)
        elif path.suffix == ".jsonl":
            # The check of a line covers its seconds.
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in ("seconds", "sum")} for line in lines]
        elif path.name == "made.json":
            found[name] = sorted(json.loads(path.read_text()))
        else:
            # Reports show times; that they are there is enough.
            found[name] = None
    return found


def compare(what, expected, found):
    if extra := sorted(set(found) - set(expected)):
        fail(f"{what}: left behind: {', '.join(extra)}")
    if missing := sorted(set(expected) - set(found)):
        fail(f"{what}: missing: {', '.join(missing)}")
    for name, content in expected.items():
        if found[name] != content:
            fail(f"{what}: {name} differs from that of an undisturbed run")

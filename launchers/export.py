"""Writes a trained run as a folder for others: weights, vocabulary, model card and, if asked, ONNX.

python launchers/export.py --run RUN_DIR --out DIR [--onnx]
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from magneto_dist.config_io import clear_parser_errors
from magneto_dist.errors import exit_with_clear_errors
from magneto_dist.export import export_run
from magneto_dist.trained_run import load_run


def main() -> None:
    """Command line -> --out."""
    parser = ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_argument(
        "--run", required=True, help="RUN_DIR; its checkpoint with the best validation F1"
    )
    parser.add_argument("--out", required=True, help="folder to write; absent or empty")
    parser.add_argument("--onnx", action="store_true", help="write model.onnx and check it")
    with clear_parser_errors("export.py"):
        options = parser.parse_args()
    run = load_run(Path(options.run))
    difference = export_run(run, Path(options.out), onnx=options.onnx)
    print(f"{options.out}: written, from {run.checkpoint}")
    if difference is not None:
        print(f"model.onnx: probabilities differ by at most {difference:.2g} from torch's")


if __name__ == "__main__":
    exit_with_clear_errors(main)

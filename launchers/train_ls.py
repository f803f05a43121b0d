"""Trains MAGNeto on a data set of shards; without arguments, on the demo data, end to end.

accelerate launch launchers/train_ls.py
accelerate launch launchers/train_ls.py --config configs/ls.yaml --data.path DIR_OR_URL
"""

from pathlib import Path

from magneto_dist.config_io import parse_command_line
from magneto_dist.errors import exit_with_clear_errors

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"


def main() -> None:
    """Command line -> trained model in --output_dir."""
    config = parse_command_line(str(__doc__), DEFAULT_CONFIG)
    # Here and not above: loader processes import this file, and need no model.
    from magneto_dist.recipe import run_training

    run_training(config)


if __name__ == "__main__":
    exit_with_clear_errors(main)

"""Trains MAGNeto or a baseline on NUS-WIDE with the settings of the paper (appendix A).

accelerate launch launchers/train_nuswide.py --data.path DIR [--model.kind magneto|tf-it|tf-t|ff]
"""

from pathlib import Path

from magneto_dist.config_io import parse_command_line
from magneto_dist.errors import exit_with_clear_errors

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "nuswide.yaml"


def main() -> None:
    """Command line -> trained model in --output_dir."""
    config = parse_command_line(str(__doc__), DEFAULT_CONFIG)
    # Here and not above: loader processes import this file, and need no model.
    from magneto_dist.recipe import run_training

    run_training(config)


if __name__ == "__main__":
    exit_with_clear_errors(main)

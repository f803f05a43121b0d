"""Where this process stands among the processes of a run, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The ranks of a run and the nodes that hold them; knows nothing of any process library.

    Ranks are numbered node by node: node k holds the ranks from k * ranks_per_node on.
    """

    rank: int = 0
    """This process, from 0 to num_ranks - 1."""
    num_ranks: int = 1
    """Processes of the whole run."""
    rank_of_node: int = 0
    """This process among those of its node, from 0 to ranks_per_node - 1."""
    ranks_per_node: int = 1
    """Processes of one node."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank {self.rank} is not in [0, {self.num_ranks})")
        if not 0 <= self.rank_of_node < self.ranks_per_node:
            raise ValueError(
                f"rank_of_node {self.rank_of_node} is not in [0, {self.ranks_per_node})"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once a run."""
        return self.rank == 0

    @property
    def node(self) -> int:
        """The node of this process, from 0."""
        return self.rank // self.ranks_per_node

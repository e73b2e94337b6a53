"""What the training loop asks of, and tells, whoever watches over its process, and how that process ends.

The library neither handles signals nor ends processes: launch/ does, through this interface. `Supervisor` itself
watches over nothing, for notebooks and tests.
"""

LOST, REQUEUE, HANG = 84, 85, 86
"""Exit codes of a rank: another one's process was killed or its node died; asked to stop, and a checkpoint is saved;
no progress. 0: all steps are done, 1: failed, 2: wrong usage or configuration."""


class Supervisor:
    """Watches over nothing."""

    def stop_requested(self) -> int:
        """The number of the signal that asked this process to stop; 0: none did."""
        return 0

    def beat(self, phase: str, patient: bool = False) -> None:
        """Training has come to `phase` ("step 12: forward and backward"): it does not hang.

        patient: the phase builds the model or reads whole checkpoints, which takes as long as size and disks need.
        """

"""Names of all keys on Redis. Control keys share one Cluster slot through the braces; frame streams spread over slots.

Source: design section 4.
"""

from __future__ import annotations


class Keys:
    """Keys of one namespace."""

    def __init__(self, namespace: str) -> None:
        self.word = namespace
        self.prefix = f"{{{namespace}}}"
        self.term = f"{self.prefix}:term"
        self.leader = f"{self.prefix}:leader"
        self.jobs = f"{self.prefix}:jobs"
        self.jobs_dead = f"{self.prefix}:jobs:dead"
        self.events = f"{self.prefix}:events"
        self.clock = f"{self.prefix}:clock"
        self.claims = f"{self.prefix}:clock:claims"
        """What is added to the TIME of the present server, under its run id."""
        self.guilds = f"{self.prefix}:guilds"
        """Set of `<bot>:<guild>` that have a record."""
        self.broadcasts = f"{self.prefix}:broadcasts"
        """Set of broadcast ids that have a record."""
        self.workers = f"{self.prefix}:workers"
        """Set of worker ids that have a record."""
        self.store = f"{self.prefix}:store"
        """Id of this store: another one stands there where it lost its data."""
        self.wake_leader = f"{self.prefix}:wake:leader"
        self.wake_all = f"{self.prefix}:wake:all"
        """Channel that tells every worker to look at the records of its broadcasts."""

    def job(self, job_id: str) -> str:
        return f"{self.prefix}:job:{job_id}"

    def broadcast(self, broadcast: str) -> str:
        return f"{self.prefix}:broadcast:{broadcast}"

    def guild(self, bot: str, guild: str) -> str:
        return f"{self.prefix}:guild:{bot}:{guild}"

    def worker(self, worker_id: str) -> str:
        return f"{self.prefix}:worker:{worker_id}"

    def lease(self, worker_id: str) -> str:
        return f"{self.prefix}:lease:{worker_id}"

    def want(self, worker_id: str) -> str:
        return f"{self.prefix}:want:{worker_id}"

    def held(self, worker_id: str) -> str:
        """What a worker holds whose `want` was lost."""
        return f"{self.prefix}:held:{worker_id}"

    def wake(self, worker_id: str) -> str:
        return f"{self.prefix}:wake:{worker_id}"

    def frames(self, run: int, rendition: str = "main") -> str:
        return f"{self.word}:frames:{{{run}}}:{rendition}"

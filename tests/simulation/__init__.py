"""A whole job under a virtual clock: the production code of coordinator, agents and vaults, and nothing else real.

::

    Run ---- World (clock, chance, trace)
     |------ Headquarters   Coordinator, Core, Broadcast, Memory over a store (production), and its launcher
     |------ Host, a node   Agent, NodeRecovery, Commits, Upkeep, Crew, Lookout, Vault and its discipline (production)
     |          '-- Rank    a scripted worker: opens, copies, meets the others, restores, finishes, at its own pace
     |------ Network        connections that keep their order; delay, cuts, resets
     |------ Faults         what goes wrong, drawn from the seed
     '------ Oracle         the promises, from what really happened: it asks no production code

One seed is one run: `random.Random(seed)` draws everything, no wall clock, no thread, nothing iterated in hash order.
"""

from simulation.run import Outcome, Violation, simulate

__all__ = ["Outcome", "Violation", "simulate"]

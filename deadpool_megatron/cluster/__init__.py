"""Who is where: the agent of each node, the coordinator, and the records they exchange."""

"""The parts of ``benchmarks.routing_sim``: traces, replicas in virtual time, our routers and the peers' rules."""

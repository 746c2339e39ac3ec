"""Ray Serve deployments: thin shells around adapter_router."""

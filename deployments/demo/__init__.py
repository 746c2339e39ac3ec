"""The demo: four real tenants on a real base, over HTTP and from a second Ray application."""

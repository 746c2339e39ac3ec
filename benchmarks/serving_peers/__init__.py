"""What ``benchmarks.serving`` measures: our application, Ray Serve's own ways to serve adapters, and what asks them."""

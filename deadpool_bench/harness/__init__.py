"""Equipment to start and watch jobs, for benches and tests."""

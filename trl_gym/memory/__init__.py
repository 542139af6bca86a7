"""Plan, share and measure the device memory of trainer and policy server."""

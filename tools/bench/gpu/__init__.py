"""What `RUNTIME=torch` gives on this machine's GPU: `make gpu-proof`."""

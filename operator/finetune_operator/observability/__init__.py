"""The operator's metrics, health probes and logs."""

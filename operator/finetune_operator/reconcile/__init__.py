"""The reconcile loop: queue, observe, plan, apply, report."""

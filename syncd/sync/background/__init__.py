"""What runs alongside passes: checkpoints, verify, builds, rotation of the outbox, repair of triggers, reports."""

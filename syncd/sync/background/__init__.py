"""Tasks that run alongside passes: checkpoints, verify, builds, rotation, repair, reports.

Each task is given the parts that it uses: the consumer's progress and session, the connection for
reports, the checkpoint store.
"""

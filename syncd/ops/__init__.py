"""Views for operators: HTTP endpoints, status page, metrics, ``check``, ``why``, webhook."""

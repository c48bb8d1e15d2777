"""What operators look at: HTTP endpoints, the page, metrics, `check`, `why`, webhooks."""

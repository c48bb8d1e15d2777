"""Vector search that is provably in step with PostgreSQL.

``connect`` and ``AsyncClient`` talk to a running ``syncd serve``; everything else is the service itself and its command line.
"""

from syncd.rpc.async_client import AsyncClient
from syncd.rpc.calls import Hit
from syncd.rpc.client import Client, connect

__all__ = ["AsyncClient", "Client", "Hit", "connect"]

"""PostgreSQL's wire protocol: searches for any PostgreSQL client, by the RPC's own methods.

``server`` owns the sockets, ``connection`` one client's bytes and its login, ``session`` the simple
and the extended protocol, ``statements`` the accepted SQL, ``calls`` its calls of RPC methods.
"""

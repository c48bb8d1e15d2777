"""PostgreSQL's wire protocol: searches for any PostgreSQL client, by the RPC's own methods.

`server` owns the sockets. One client: `connection` its bytes, `login` its first messages, `session`
the simple and the extended protocol, `kept` what it keeps. One statement: `lexer` its literals,
`statements` and `commands` the accepted SQL, `calls` the call of an RPC method, `types` its values.
"""

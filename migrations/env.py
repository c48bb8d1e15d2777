"""Alembic's environment: the caller's connection, and the version table in schema syncd."""

from alembic import context

from syncd.statements import statement

VERSION_TABLE = {"version_table": "alembic_version", "version_table_schema": "syncd"}

if context.is_offline_mode():
    context.configure(
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},
        as_sql=True,
        **VERSION_TABLE,
    )  # type: ignore[arg-type]
else:
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, **VERSION_TABLE)  # type: ignore[arg-type]

with context.begin_transaction():
    for part in (
        "first_of_init",
        "settings",
        "literals",
        "time_outs",
        "time_outs_of_init",
        "service_settings",
        "new_tables",
    ):
        context.execute(statement("session", part))
    context.execute(statement("schema", "lock_init"))
    context.execute("CREATE SCHEMA IF NOT EXISTS syncd")
    context.run_migrations()

"""Alembic's environment: one connection that the caller opened, the version table in schema syncd."""

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
    context.configure(connection=context.config.attributes["connection"], **VERSION_TABLE)  # type: ignore[arg-type]

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
    context.execute("CREATE SCHEMA IF NOT EXISTS syncd")
    context.run_migrations()

"""Django: write rows as always; syncd finds the nearest, and the ORM reads them.

SYNCD_DSN is a libpq connection string, SYNCD_SOCKET the socket of a running syncd. A project has
the settings, the model and the migration in their usual places. Here they are in one file.
"""

import os

import django
from django.conf import settings
from psycopg.conninfo import conninfo_to_dict

import syncd

dsn = conninfo_to_dict(os.environ["SYNCD_DSN"])
settings.configure(
    DATABASES={
        "default": {
            "ENGINE": "django.db.backends.postgresql",
            "NAME": dsn.get("dbname"),
            "USER": dsn.get("user"),
            "PASSWORD": dsn.get("password"),
            "HOST": dsn.get("host"),
            "PORT": dsn.get("port"),
        }
    },
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

from django.contrib.postgres.fields import ArrayField  # noqa: E402
from django.db import connection, migrations, models, transaction  # noqa: E402
from django.db.migrations.state import ProjectState  # noqa: E402


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel(
            "Note",
            [
                ("id", models.BigAutoField(primary_key=True)),
                ("title", models.TextField()),
                ("embedding", ArrayField(models.FloatField())),  # or pgvector.django.VectorField
                ("deleted", models.BooleanField(default=False)),
            ],
            {"db_table": "notes"},
        ),
        migrations.RunSQL(
            "SELECT syncd.attach('notes', live => 'NOT deleted')",
            reverse_sql="SELECT syncd.detach('notes')",
        ),
    ]


with connection.schema_editor() as editor:  # manage.py migrate
    state = Migration("0001_initial", "notes").apply(ProjectState(), editor)
Note = state.apps.get_model("notes", "Note")


def nearest(client, vector, token):
    hits = client.search("notes", vector, k=2, after=token)
    found = Note.objects.in_bulk([hit.key for hit in hits])
    return [found[hit.key] for hit in hits if hit.key in found]


with syncd.connect(os.environ["SYNCD_SOCKET"]) as client:
    with transaction.atomic():
        Note.objects.create(title="red", embedding=[1, 0, 0])
        Note.objects.create(title="gone", embedding=[1, 0, 0], deleted=True)
        Note.objects.create(title="green", embedding=[0, 1, 0])
        Note.objects.create(title="orange", embedding=[0.9, 0.4, 0.0])
        with connection.cursor() as cursor:
            cursor.execute("SELECT syncd.token()")
            (token,) = cursor.fetchone()
    for note in nearest(client, [1, 0, 0], token):
        print(note.title)

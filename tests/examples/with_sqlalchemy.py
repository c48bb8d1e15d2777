"""SQLAlchemy: write rows as always; syncd finds the nearest, and SQLAlchemy reads them.

SYNCD_DSN is a URL of PostgreSQL, SYNCD_SOCKET the socket of a running syncd.
"""

import os

from sqlalchemy import REAL, create_engine, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import syncd


class Base(DeclarativeBase):
    pass


class Article(Base):
    __tablename__ = "articles"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    lang: Mapped[str]
    embedding: Mapped[list[float]] = mapped_column(ARRAY(REAL))  # or pgvector.sqlalchemy.Vector


def nearest(
    session: Session, client: syncd.Client, vector: list[float], token: str
) -> list[Article]:
    hits = client.search("articles", vector, k=2, filter={"lang": "en"}, after=token)
    found = {
        article.id: article
        for article in session.scalars(
            select(Article).where(Article.id.in_([hit.key for hit in hits]))
        )
    }
    return [found[hit.key] for hit in hits if hit.key in found]


engine = create_engine(os.environ["SYNCD_DSN"])
Base.metadata.create_all(engine)
with engine.begin() as connection:  # in a program: a migration, see syncd.apps.alembic
    connection.execute(text("SELECT syncd.attach('articles', columns => ARRAY['lang'])"))

with Session(engine) as session, syncd.connect(os.environ["SYNCD_SOCKET"]) as client:
    session.add_all(
        [
            Article(title="red", lang="en", embedding=[1, 0, 0]),
            Article(title="rot", lang="de", embedding=[1, 0, 0]),
            Article(title="green", lang="en", embedding=[0, 1, 0]),
            Article(title="orange", lang="en", embedding=[0.9, 0.4, 0.0]),
        ]
    )
    session.flush()
    token = session.scalar(select(func.syncd.token()))  # of this transaction
    session.commit()
    for article in nearest(session, client, [1, 0, 0], token):
        print(article.title)
engine.dispose()

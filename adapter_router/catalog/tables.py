"""The catalog's tables. ``migrations`` brings a database here; HEAD is the schema this code reads and writes.

Ids of adapters and versions are the revision that made them, so they never come back. JSON is kept as ASCII text: it
holds whatever a stranger's file or a server's answer says, also what PostgreSQL's own types refuse.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.types import TypeEngine

from adapter_router.types import is_unicode

HEAD = "0002"

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class _Name(TypeDecorator[str]):
    """An adapter's or an alias' name, in code point order on every database, as Python sorts.

    What no database could hold is compared as the empty name, which nobody has.
    """

    impl = String(200)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[str]:
        collation = "C" if dialect.name == "postgresql" else None
        return dialect.type_descriptor(String(200, collation=collation))

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return value if value is None or (is_unicode(value) and "\0" not in value) else ""


_Id = BigInteger().with_variant(Integer(), "sqlite")

clock = Table(
    "clock",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("revision", _Id, nullable=False),
    Column("num_adapters", _Id, nullable=False),
)
"""One row: the number of the last change, and how many adapters are registered. Who writes holds its lock."""

adapters = Table(
    "adapters",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("name", _Name, nullable=False, unique=True),
    Column("spec", Text, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("preload", Boolean, nullable=False),
    Column("lazy", Boolean, nullable=False),
    Column("managed", Boolean, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("created", Double, nullable=False),
    Column("updated", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("failure", Text),
    Column("retry_at", Double),
    Column("claimed_by", String(200)),
    Column("claimed_until", Double),
    Column("due", Double, index=True),  # when somebody should work on it
    Column("wanted", Boolean, nullable=False),  # on every replica: pinned or preload
    Column("newest", Integer, nullable=False),  # number of its newest version
    Column("began", _Id, nullable=False, server_default="0"),  # revision that registered it, or did so anew
    Index(None, "phase", "name"),
    Index(None, "wanted", "name"),
    Index(None, "managed", "name"),
)

versions = Table(
    "versions",
    metadata,
    Column("id", _Id, primary_key=True, autoincrement=False),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("identity", String(64), nullable=False),
    Column("digest", Text().with_variant(Text(collation="C"), "postgresql"), nullable=False, index=True),
    Column("base", Text, nullable=False),
    Column("num_bytes", _Id, nullable=False),
    Column("body", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("retired", Double),
    UniqueConstraint("adapter_id", "number"),
    UniqueConstraint("adapter_id", "identity"),
    Index(None, "adapter_id", "digest"),
)

totals = Table(
    "totals",
    metadata,
    Column("base", Text, primary_key=True),
    Column("adapters", _Id, nullable=False),
    Column("versions", _Id, nullable=False),
    Column("num_bytes", _Id, nullable=False),
)
"""By base: adapters with unretired versions for it, those versions, and their bytes on a device."""

aliases = Table(
    "aliases",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("adapter_id", _Id, ForeignKey("adapters.id"), unique=True),  # of an adapter's own name
    Column("revision", _Id, nullable=False),
    Column("updated", Double, nullable=False),
)

targets = Table(
    "targets",
    metadata,
    Column("alias", _Name, ForeignKey("aliases.name"), primary_key=True),
    Column("version_id", _Id, ForeignKey("versions.id"), primary_key=True, index=True),
    Column("weight", Integer, nullable=False),
)

history = Table(
    "history",
    metadata,
    Column("alias", _Name, ForeignKey("aliases.name"), primary_key=True),
    Column("revision", _Id, primary_key=True, autoincrement=False),  # that replaced these targets by others
    Column("targets", Text, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("revision", _Id, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("name", _Name, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("detail", Text, nullable=False),
    Index(None, "name", "revision"),
)

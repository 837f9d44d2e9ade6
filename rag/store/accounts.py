"""Accounts, and what lets their owners in: passwords, sessions, API keys. Secrets are only hashed.

Passwords are hashed with argon2id; sessions and keys are 256 random bits, of which the SHA-256 is
kept. Removing an account removes its sessions and keys in the same transaction.
"""

import hashlib
import re
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from sqlalchemy import Connection, delete, func, insert, select, update

from rag.errors import AccountError
from rag.store.access import NAMELESS
from rag.store.database import Database
from rag.store.schema import account, answer, collection_share, credential, document

SESSION_DAYS = 14
LEAST_PASSWORD_CHARS = 10
MOST_PASSWORD_CHARS = 1024  # hashing a longer one would only cost time
KEY_PREFIX = "fathom-"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HASHER = PasswordHasher()


@dataclass(frozen=True, slots=True)
class Account:
    """One person who may sign in."""

    name: str
    created_at: str
    num_keys: int

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom users list --json` prints on one line."""
        return asdict(self)


class AccountStore:
    """The accounts of one library."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[Account]:
        """Return the accounts by name."""
        keys = (
            select(func.count())
            .where(credential.c.account == account.c.name, credential.c.kind == "key")
            .scalar_subquery()
        )
        query = select(account.c.name, account.c.created_at, keys.label("num_keys"))
        with self._database.read() as connection:
            return [Account(*row) for row in connection.execute(query.order_by(account.c.name))]

    def any(self) -> bool:
        """Say whether there is an account: if so, everybody has to sign in."""
        with self._database.read() as connection:
            return connection.execute(select(account.c.name).limit(1)).first() is not None

    def add(self, name: str, password: str) -> None:
        """Make an account.

        Raises:
            AccountError: if the name is taken or cannot be one, or the password is too short.
        """
        if not _NAME.fullmatch(name) or name == NAMELESS:
            raise AccountError(
                f"{name!r} cannot name an account; expected up to 64 of a-z, 0-9 and . _ -,"
                f" beginning with a letter or digit, and not {NAMELESS!r}",
                hint="choose another name, such as anna",
            )
        _require_good(password)
        with self._database.write() as connection:
            if _exists(connection, name):
                raise AccountError(
                    f"there is an account {name!r} already",
                    hint=f"to set another password: fathom users password {name}",
                )
            if _has_leftovers(connection, name):
                raise AccountError(
                    f"something of an earlier account {name!r} is still there, which a request that"
                    " was running when it was removed has left",
                    hint=f"fathom users remove {name} deletes it",
                )
            row = {"name": name, "password_hash": _HASHER.hash(password), "created_at": _now()}
            connection.execute(insert(account).values(row))

    def set_password(self, name: str, password: str) -> None:
        """Set another password; whoever is signed in with the old one is signed out.

        Raises:
            AccountError: if there is no such account, or the password is too short.
        """
        _require_good(password)
        with self._database.write() as connection:
            _require(connection, name)
            connection.execute(
                update(account)
                .where(account.c.name == name)
                .values(password_hash=_HASHER.hash(password))
            )
            sessions = (credential.c.account == name) & (credential.c.kind == "session")
            connection.execute(delete(credential).where(sessions))

    def remove(self, name: str) -> None:
        """Remove an account with its sessions and keys, and what was shared with it.

        What it owns stays in the library until `Library.delete_everything`.

        Raises:
            AccountError: if there is no such account, nor anything that an earlier one has left.
        """
        with self._database.write() as connection:
            if not _has_leftovers(connection, name):
                _require(connection, name)
            connection.execute(delete(credential).where(credential.c.account == name))
            connection.execute(delete(collection_share).where(collection_share.c.reader == name))
            connection.execute(delete(account).where(account.c.name == name))

    def require(self, name: str) -> None:
        """Raise AccountError if there is no such account."""
        with self._database.read() as connection:
            _require(connection, name)

    def password_is_right(self, name: str, password: str) -> bool:
        """Say whether the account exists and this is its password; both take as long."""
        query = select(account.c.password_hash).where(account.c.name == name)
        with self._database.read() as connection:
            stored = connection.scalar(query)
        if len(password) > MOST_PASSWORD_CHARS:
            return False
        try:
            _HASHER.verify(stored or _nobody(), password)
        except (Argon2Error, InvalidHashError):
            return False
        return stored is not None

    def open_session(self, name: str) -> str:
        """Return the secret of a new session; expired ones are dropped.

        Raises:
            AccountError: if the account was removed meanwhile.
        """
        now = datetime.now(UTC)
        with self._database.write() as connection:
            _require(connection, name)
            connection.execute(delete(credential).where(credential.c.expires_at < _text(now)))
            return _new_secret(
                connection, name, "session", expires_at=_text(now + timedelta(days=SESSION_DAYS))
            )

    def close_session(self, secret: str) -> None:
        """End a session."""
        with self._database.write() as connection:
            connection.execute(delete(credential).where(_is(secret, "session")))

    def make_key(self, name: str) -> str:
        """Return a new API key, which can never be shown again.

        Raises:
            AccountError: if there is no such account.
        """
        with self._database.write() as connection:
            _require(connection, name)
            return _new_secret(connection, name, "key", expires_at=None)

    def delete_keys(self, name: str) -> int:
        """Delete all keys of an account and return how many there were.

        Raises:
            AccountError: if there is no such account.
        """
        with self._database.write() as connection:
            _require(connection, name)
            keys = (credential.c.account == name) & (credential.c.kind == "key")
            return connection.execute(delete(credential).where(keys)).rowcount

    def account_of_session(self, secret: str) -> str | None:
        """Return whose session this is, None if it has ended."""
        still = credential.c.expires_at >= _text(datetime.now(UTC))
        query = select(credential.c.account).where(_is(secret, "session"), still)
        with self._database.read() as connection:
            return connection.scalar(query)

    def account_of_key(self, secret: str) -> str | None:
        """Return whose API key this is, None if it is no key."""
        with self._database.read() as connection:
            return connection.scalar(select(credential.c.account).where(_is(secret, "key")))


@cache
def _nobody() -> str:
    """Return what an unknown name is checked against: as slow as a known one, and nothing fits."""
    return _HASHER.hash(secrets.token_hex(32))


def _new_secret(connection: Connection, name: str, kind: str, *, expires_at: str | None) -> str:
    secret = (KEY_PREFIX if kind == "key" else "") + secrets.token_urlsafe(32)
    connection.execute(
        insert(credential).values(
            secret_sha256=_sha256(secret),
            kind=kind,
            account=name,
            created_at=_now(),
            expires_at=expires_at,
        )
    )
    return secret


def _is(secret: str, kind: str) -> Any:  # noqa: ANN401 - a condition of SQLAlchemy
    return (credential.c.secret_sha256 == _sha256(secret)) & (credential.c.kind == kind)


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _exists(connection: Connection, name: str) -> bool:
    query = select(account.c.name).where(account.c.name == name)
    return connection.execute(query).first() is not None


def _has_leftovers(connection: Connection, name: str) -> bool:
    return any(
        connection.execute(select(table.c.id).where(table.c.owner == name).limit(1)).first()
        for table in (document, answer)
    )


def _require(connection: Connection, name: str) -> None:
    if not _exists(connection, name):
        known = ", ".join(connection.scalars(select(account.c.name).order_by(account.c.name)))
        raise AccountError(
            f"there is no account {name!r}; there are: {known or 'none'}",
            hint="fathom users add makes one",
        )


def _require_good(password: str) -> None:
    if not LEAST_PASSWORD_CHARS <= len(password) <= MOST_PASSWORD_CHARS:
        raise AccountError(
            f"the password has {len(password)} characters; expected {LEAST_PASSWORD_CHARS} to"
            f" {MOST_PASSWORD_CHARS:,}",
            hint="a few words in a row make a good one",
        )


def _now() -> str:
    return _text(datetime.now(UTC))


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")

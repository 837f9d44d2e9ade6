"""fathom users: who may sign in, their API keys, and what is shared with them."""

import sys
from typing import Annotated

import typer

from rag.errors import AccountError
from rag.settings import load_settings
from ui.console import Home, Json, err, open_fathom, out, print_json
from ui.formatting import plural

app = typer.Typer(
    help="Accounts: with any, everybody has to sign in, and each has documents of his own.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="a-z, 0-9 and . _ -")]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input.")
]


@app.command(epilog="Examples: fathom users add anna  |  fathom users add anna --password-stdin")
def add(
    name: Name, password_stdin: PasswordStdin = False, home: Home = None, as_json: Json = False
) -> None:
    """Make an account; the password is asked for twice."""
    fathom = open_fathom(load_settings(home=home))
    fathom.accounts.add(name, _password(password_stdin))
    if as_json:
        print_json({"added": name})
    else:
        out.print(f"{name} may sign in now", markup=False)


@app.command("list", epilog="Examples: fathom users list  |  fathom users list --json")
def list_users(home: Home = None, as_json: Json = False) -> None:
    """List the accounts with what they keep."""
    fathom = open_fathom(load_settings(home=home))
    accounts = fathom.accounts.all()
    if not accounts and not as_json:
        err.print("there is no account; nobody has to sign in")
    for account in accounts:
        num_documents, num_bytes = fathom.for_owner(account.name).store.usage()
        if as_json:
            print_json(account.to_json() | {"documents": num_documents, "bytes": num_bytes})
        else:
            out.print(
                f"{account.name:<20} since {account.created_at[:10]},"
                f" {plural(account.num_keys, 'key')}, {plural(num_documents, 'document')},"
                f" {num_bytes / 2**20:,.1f} MiB",
                markup=False,
            )


@app.command(epilog="Examples: fathom users remove anna  |  fathom users remove anna --yes --json")
def remove(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Remove an account with its documents, answers and keys; who is signed in is out at once."""
    fathom = open_fathom(load_settings(home=home))
    num_documents, _ = fathom.for_owner(name).store.usage()
    if not num_documents:
        fathom.accounts.require(name)
    if not yes:
        typer.confirm(
            f"Delete {name}, {plural(num_documents, 'document')} and all answers?", abort=True
        )
    fathom.remove_account(name)
    if as_json:
        print_json({"removed": name, "documents": num_documents})
    else:
        out.print(f"removed {name} and {plural(num_documents, 'document')}", markup=False)


@app.command(
    epilog="Examples: fathom users password anna  |  fathom users password anna --password-stdin"
)
def password(
    name: Name, password_stdin: PasswordStdin = False, home: Home = None, as_json: Json = False
) -> None:
    """Set another password; whoever is signed in with the old one is out at once."""
    fathom = open_fathom(load_settings(home=home))
    fathom.accounts.require(name)
    fathom.accounts.set_password(name, _password(password_stdin))
    if as_json:
        print_json({"changed": name})
    else:
        out.print(f"{name} has another password now", markup=False)


@app.command(epilog="Examples: fathom users key anna  |  fathom users key anna --revoke --json")
def key(
    name: Name,
    revoke: Annotated[
        bool, typer.Option("--revoke", help="Delete all keys of the account instead.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make an API key. It is shown this once: only its hash is kept."""
    accounts = open_fathom(load_settings(home=home)).accounts
    if revoke:
        number = accounts.delete_keys(name)
        if as_json:
            print_json({"revoked": number})
        else:
            out.print(f"{number} keys of {name} are void now", markup=False)
        return
    made = accounts.make_key(name)
    if as_json:
        print_json({"key": made})
    else:
        out.print(made, markup=False)
        err.print("send it as: Authorization: Bearer KEY; it cannot be shown again")


@app.command(
    epilog="Examples: fathom users share contracts --with everyone"
    "  |  FATHOM_USER=ben fathom users share contracts --with anna  |  fathom users share --json"
)
def share(
    collection: Annotated[str | None, typer.Argument(help="Name of the collection.")] = None,
    reader: Annotated[
        str | None, typer.Option("--with", help="An account, or everyone who may sign in.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Share it no more.")] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let others read a collection, and list what is shared. They can neither change nor share it.

    A reader sees it as OWNER/NAME, one of the command line's own as library/NAME. FATHOM_USER names
    the account whose collection it is.
    """
    from rag.store.access import EVERYONE

    fathom = open_fathom(load_settings(home=home))
    store = fathom.store
    if collection is not None:
        if reader is None and not stop:
            raise typer.BadParameter("name who may read it with --with")
        if reader is not None and reader != "everyone":
            fathom.accounts.require(reader)
        stored = EVERYONE if reader == "everyone" else reader
        if stop:
            store.unshare_collection(collection, stored)
        elif stored is not None:
            store.share_collection(collection, stored)
    for name, readers in store.readers().items():
        shown = ["everyone" if reader == EVERYONE else reader for reader in readers]
        if as_json:
            print_json({"collection": name, "owner": fathom.owner, "readers": shown})
        else:
            out.print(f"{name}: {', '.join(shown)}", markup=False)


def _password(from_stdin: bool) -> str:
    """Return the password: the first line of standard input, or typed twice without echo."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise AccountError(
            "a password can only be typed at a terminal", hint="or give it with --password-stdin"
        )
    first: str = typer.prompt("Password", hide_input=True, err=True)
    second: str = typer.prompt("Once more", hide_input=True, err=True)
    if first != second:
        raise AccountError("the two passwords differ", hint="run the command again")
    return first

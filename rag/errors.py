"""Every error that Fathom raises on purpose.

    FathomError
    ├── SettingsError               a setting is unknown, malformed or contradicts another
    ├── InstallError                the installation itself is wrong, e.g. two FAISS builds
    ├── ReadError                   a source could not be read
    │   ├── SourceNotFoundError       nothing is there, or it is not a regular file
    │   ├── UnsupportedFormatError    no reader accepts it
    │   ├── EncryptedDocumentError    it needs a password
    │   ├── EmptyDocumentError        it holds no text
    │   └── ReaderFailedError         the guarded reader crashed or hit a limit
    ├── StoreError                  the library could not be read or written
    │   ├── DocumentNotFoundError     no document answers to that name
    │   ├── EmptyLibraryError         there is nothing to ask about
    │   ├── ReplayError               the words of a past question are gone
    │   ├── StorageFullError          the disk is full; nothing was written
    │   └── EmbedderMismatchError     the stored vectors come from another embedder
    ├── QuestionError               a question says nothing, or too much, or asks no document
    ├── ModelError                  a model could not be found, fetched or run
    │   ├── UnknownModelError         neither catalog name, folder nor hub id
    │   ├── ModelFetchError           a file could not be had, or its checksum is wrong
    │   ├── BrokenModelError          its files are damaged, incomplete or belie its config
    │   ├── UnsupportedModelError     its cache or positions cannot be predicted exactly
    │   ├── OutOfMemoryError          a request needed more memory than there is; the model goes on
    │   └── ModelServerError          the server that runs the model gave no answer
    ├── TableError                  a table of questions or answers could not be read or written
    │   └── BatchNotFoundError        no batch of this owner answers to that id
    ├── AccountError                an account could not be made, changed or found
    ├── QuotaError                  somebody asks for more than his share
    ├── TooFewPairsError            nothing can be fitted from so few questions
    └── ServeError                  the web page could not be served

The message says what was found and what was expected; the hint says what to do.
The command line prints both and exits with 1; the web page shows both.
"""


class FathomError(Exception):
    """Base of every error meant for a person: catch it at the edge, show `message` and `hint`."""

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class SettingsError(FathomError):
    """A setting is unknown, malformed or contradicts another."""


class InstallError(FathomError):
    """The installation itself is wrong."""


class ReadError(FathomError):
    """A source could not be read."""


class SourceNotFoundError(ReadError):
    """Nothing is at the given path, or it is not a regular file."""


class UnsupportedFormatError(ReadError):
    """No reader accepts the file."""


class EncryptedDocumentError(ReadError):
    """The document needs a password."""


class EmptyDocumentError(ReadError):
    """The document holds no text."""


class ReaderFailedError(ReadError):
    """The guarded reader crashed or ran into its memory, CPU or time limit."""


class StoreError(FathomError):
    """The library could not be read or written."""


class DocumentNotFoundError(StoreError):
    """No document answers to the given name or number."""


class EmptyLibraryError(StoreError):
    """There is no document to ask about."""


class ReplayError(StoreError):
    """The words of a past question are gone with a document."""


class StorageFullError(StoreError):
    """The disk is full; the transaction was rolled back and nothing was written."""


class EmbedderMismatchError(StoreError):
    """The stored vectors come from another embedder than the one in use."""


class QuestionError(FathomError):
    """A question has no word or too many, or there is no document that it asks."""


class ModelError(FathomError):
    """A model could not be found, fetched or run."""


class UnknownModelError(ModelError):
    """The name is neither in the catalog nor a folder nor a hub id."""


class ModelFetchError(ModelError):
    """A model file could not be had, or its checksum is not the catalog's."""


class BrokenModelError(ModelError):
    """The model's files are damaged, incomplete, or not those that its config describes."""


class UnsupportedModelError(ModelError):
    """The model's cache or positions cannot be predicted exactly, so it is refused."""


class OutOfMemoryError(ModelError):
    """Memory ran out in the middle of a request; what it held is free again."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            hint="free memory, ask about fewer or shorter documents, or lower"
            " FATHOM_RETRIEVAL_TOKENS",
        )


class ModelServerError(ModelError):
    """The server that runs the model could not be reached, refused, or broke off."""


class TableError(FathomError):
    """A table could not be read or written, or is not what it should be."""


class BatchNotFoundError(TableError):
    """No batch of this owner answers to that id."""


class AccountError(FathomError):
    """An account, its password or its keys could not be made, changed or found."""


class QuotaError(FathomError):
    """Somebody asks for more documents, bytes or turns than his share."""


class TooFewPairsError(FathomError):
    """Nothing can be fitted from so few questions."""


class ServeError(FathomError):
    """The web page could not be served."""

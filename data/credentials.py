"""Secrets in URLs: found, refused, and masked where the URL must be named.

Settings are written to the run directory, the tracker and jobs, and URLs are repeated in messages and logs. So no URL
may hold a secret: not before the host (s3://KEY:SECRET@bucket) and not behind a question mark (?X-Amz-Signature=...).
"""

import re

# A name before the host that is a part of the address: abfs://container@account.dfs.core.windows.net, sftp://me@host.
_NAMES_IN_ADDRESSES = ("abfs", "abfss", "wasb", "wasbs", "az", "hdfs", "webhdfs", "sftp", "ssh", "smb")
# What comes before an "@"; with a colon that begins no port it may hold slashes, as S3's secrets do.
_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\s]*|[^/?#@\[\s]*:(?!\d+(?:[/?#]|$))[^?#\s]*)@")
_SECRET = re.compile(
    r"([?&;#](?:sig|pwd|key|auth|[^=&;#?\s]*"
    r"(?:secret[^=&;#?\s]*|signature|token|passw(?:or)?d|passphrase|credentials?|access[_-]?key(?:[_-]?id)?|api[_-]?key)))"
    r"=([^&;#\s'\"]+)",
    re.IGNORECASE,
)
_VARIABLES = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "s3a": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}


def refuse_credentials(field: str, url: str, variables: str | None = None) -> str:
    """`url`, unless it holds a user, a password or a signed query.

    Args:
        field: what the user calls it, as in "data.corpus". variables: what to set instead, where that is known.

    ValueError, of one line: it does; the secret is masked.
    """
    if holds_credentials(url):
        scheme = re.search(r"([A-Za-z0-9+.-]+)://", url)
        instead = variables or _VARIABLES.get(scheme[1].lower() if scheme else "", "the store's environment variables")
        raise ValueError(
            f"{field}={mask_credentials(url)} holds credentials: take them out of the URL and set {instead} instead"
        )
    return url


def holds_credentials(url: str) -> bool:
    """Whether there is a secret in a URL, or in one of a chain of them (simplecache::s3://...)."""
    return mask_credentials(url) != url


def mask_credentials(text: str) -> str:
    """`text` with *** in place of the secrets of the URLs in it."""
    return _SECRET.sub(r"\1=***", _USER.sub(_mask_user, text)) if "://" in text else text


def _mask_user(found: re.Match[str]) -> str:
    scheme, user = found.groups()
    kept = not user or user == "***" or (":" not in user and scheme.lower() in _NAMES_IN_ADDRESSES)
    return found[0] if kept else f"{scheme}://***@"

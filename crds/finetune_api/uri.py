"""Where models, data and adapters live: hf://, s3://, pvc:// and file:// URIs; where adapters are pushed: oci://, too.

The same patterns feed the CRD's CEL rules (RE2) and the checks here, so `kubectl apply` and Python agree.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from finetune_api.patterns import TextRule

MAX_LENGTH: Final = 1024
# Letters of all languages, and their marks. Not in these ranges: spaces but the plain one, what turns the direction of
# writing or is not seen (but the two joiners that Persian and Indian words need), private use, half characters.
_BEYOND_ASCII = "".join(
    f"{chr(first)}-{chr(last)}"
    for first, last in (
        (0xA1, 0xAC),
        (0xAE, 0x61B),
        (0x61D, 0x167F),
        (0x1681, 0x180D),
        (0x180F, 0x1FFF),
        (0x200C, 0x200D),
        (0x2010, 0x2027),
        (0x2030, 0x205E),
        (0x2070, 0x2FFF),
        (0x3001, 0xD7FF),
        (0xF900, 0xFDCF),
        (0xFDF0, 0xFEFE),
        (0xFF00, 0xFFEF),
        (0x10000, 0x3FFFD),
    )
)
_CHARACTERS = f"A-Za-z0-9._~@+=,:%!(){_BEYOND_ASCII}-"
_SEGMENT = f"[{_CHARACTERS}]([ {_CHARACTERS}]*[{_CHARACTERS}])?"
_PATH = rf"(/{_SEGMENT})*/?"
_HOST = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?"
_COMPONENT = r"/[a-z0-9]+([._-]+[a-z0-9]+)*"
_TAG = r":[A-Za-z0-9_][A-Za-z0-9._-]{0,127}"
FORMS: Final = {
    "hf": (rf"hf://(datasets/)?[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*{_PATH}", "hf://owner/name"),
    "s3": (rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]{_PATH}", "s3://bucket/key"),
    "pvc": (rf"pvc://[a-z0-9]([a-z0-9.-]*[a-z0-9])?{_PATH}", "pvc://claim/path"),
    "file": (rf"file:///{_SEGMENT}{_PATH}", "file:///absolute/path"),
    "oci": (rf"oci://{_HOST}({_COMPONENT})+{_TAG}", "oci://registry/repository:tag"),
}
PARENT_PATTERN: Final = r"(^|/)[.][.]?(/|$)"
PARENT_MESSAGE: Final = "must not hold '.' or '..' path segments"
# A user before the host: an @ before the first slash of what follows the scheme, or a : there and an @ anywhere after,
# for secrets may hold slashes (those of AWS do). No scheme that is taken knows a : there, so keys may hold both.
_USERINFO = r"[A-Za-z0-9+.-]+:([^/].*@|//?[^/]*(@|:.*@))"
USERINFO_PATTERN: Final = rf"(?s)^[^A-Za-z0-9]*{_USERINFO}"

READABLE: Final = ("hf", "s3", "pvc", "file")
WRITABLE: Final = ("s3", "pvc", "file")
#: Where an adapter can be pushed to, besides.
PUSHED: Final = ("oci", "hf")


def pattern(schemes: tuple[str, ...]) -> str:
    """Return the anchored RE2 pattern of a URI of one of `schemes`."""
    return "^(" + "|".join(FORMS[scheme][0] for scheme in schemes) + ")$"


#: In a place that a job writes to, this stands for metadata.name (manifest.check fills it in).
NAME_FIELD: Final = "{name}"


def place(value: str) -> str:
    """Return the URI as the folder it names, to compare: a slash at its end changes nothing."""
    return value.rstrip("/")


def allowed(schemes: tuple[str, ...]) -> str:
    """Return the forms of `schemes` in words: 's3://bucket/key, pvc://claim/path or file:///absolute/path'."""
    forms = [FORMS[scheme][1] for scheme in schemes]
    return ", ".join(forms[:-1]) + f" or {forms[-1]}"


def redacted(text: str) -> str:
    """`text` without what may be a secret in it, should it be a URI: a user and password, or a signed query."""
    hidden = re.sub(USERINFO_PATTERN + "(.*@)?", "…@", text)
    return re.sub(r"(?s)(://[^?]*[?]).*", r"\1…", hidden)


@cache
def rules(schemes: tuple[str, ...]) -> tuple[TextRule, ...]:
    """Return what a URI field taking `schemes` checks, in the order a user should hear of it."""
    return (
        TextRule(USERINFO_PATTERN, "must not hold credentials: put them in a Secret and name it in secretRef", True),
        TextRule(PARENT_PATTERN, PARENT_MESSAGE, True),
        TextRule(
            pattern(schemes),
            f"must be {allowed(schemes)}; a path may hold letters of any language, digits, . _ ~ @ + = , : - % ! ( )"
            " and spaces inside a name",
        ),
    )


def cause(value: str, *, hub: bool = False) -> str:
    """Return what is most likely wrong with a value that is no URI, in a few words that hold nothing of it; or ''.

    Args:
        value: What was given.
        hub: Whether the field takes hf://.
    """
    scheme, mark, rest = value.partition("://")
    if value != value.strip():
        return "there is a space before or after it"
    if not mark:
        return _no_uri(value, hub)
    if scheme in ("http", "https"):
        return "what lies in the web is not fetched: download it, or put it into a bucket"
    if scheme not in FORMS:
        return "schemes are lowercase" if scheme.lower() in FORMS else "it begins with none of these schemes"
    return _wrong_rest(scheme, rest)


def _no_uri(value: str, hub: bool) -> str:
    if re.match(rf"({'|'.join(FORMS)}):", value):
        return "two slashes follow the scheme and its colon"
    path = "a path is written file:///absolute/path, or file://./path for this manifest's folder"
    is_name = hub and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*", value)
    return f"a repository of the hub is written hf://owner/name; {path}" if is_name else path


def _wrong_rest(scheme: str, rest: str) -> str:
    if scheme == "file" and rest.startswith("./"):  # resolved before, where it is read
        return "file://./… is for finetune run: a cluster cannot see this machine's files"
    if scheme == "file" and not rest.startswith("/"):
        return "file:// takes an absolute path (file:///…), or file://./… for this manifest's folder"
    if scheme == "s3" and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", rest.partition("/")[0]):
        return "a bucket has 3 to 63 lowercase letters, digits, dots and dashes"
    if scheme == "hf" and "/" not in rest.strip("/"):
        return "the owner or the name is missing"
    if any(name != name.strip(" ") for name in rest.split("/")):
        return "a name in its path begins or ends with a space"
    if "//" in rest.lstrip("/"):
        return "two slashes follow each other in its path"
    if re.search(r"[*?]", rest):
        return "there are no wildcards: name a file, or the folder that holds the files"
    return ""


@cache
def rules_with_name(schemes: tuple[str, ...]) -> tuple[TextRule, ...]:
    """Return the rules of a URI field that may hold {name} in its path."""
    *first, form = rules(schemes)
    with_braces = form.pattern.replace(_CHARACTERS, _CHARACTERS.replace("!()", "!(){}"))
    return (
        *first,
        TextRule(r"^([^{}]|[{]name[}])*$", "may hold {name}, which stands for the job's name, and no other braces"),
        TextRule(with_braces, f"{form.message}; {{name}} stands for the job's name"),
    )


@cache
def image_rules() -> tuple[TextRule, ...]:
    """Return the rules of an image in a registry, which may hold {name} in its repository or its tag."""
    pattern, form = FORMS["oci"]
    with_braces = pattern.replace("[a-z0-9]+", "[a-z0-9{}]+").replace("[A-Za-z0-9_]", "[A-Za-z0-9_{}]")
    with_braces = with_braces.replace("[A-Za-z0-9._-]", "[A-Za-z0-9._{}-]")
    return (
        TextRule(USERINFO_PATTERN, "must not hold credentials: put them in a Secret and name it in secretRef", True),
        TextRule(r"^([^{}]|[{]name[}])*$", "may hold {name}, which stands for the job's name, and no other braces"),
        TextRule(f"^{with_braces}$", f"must be {form}, in lowercase but for the tag"),
    )


@cache
def repository_rules() -> tuple[TextRule, ...]:
    """Return the rules of a model repository to push to, which may hold {name}."""
    word = "[A-Za-z0-9{][A-Za-z0-9._{}-]*"
    return (
        TextRule(USERINFO_PATTERN, "must not hold credentials: put them in a Secret and name it in secretRef", True),
        TextRule(r"^([^{}]|[{]name[}])*$", "may hold {name}, which stands for the job's name, and no other braces"),
        TextRule(rf"^hf://{word}/{word}$", "must be hf://owner/name, a model repository"),
    )


@dataclass(frozen=True)
class Uri:
    """A parsed URI. `authority` is the bucket (s3), claim (pvc), 'owner/name' (hf), registry (oci) or '' (file).

    `path` has no leading slash, except for file, where it is the absolute path. A trailing slash means a prefix.
    """

    scheme: str
    authority: str
    path: str
    is_dataset: bool = False

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{self.path}"
        prefix = "datasets/" if self.is_dataset else ""
        return f"{self.scheme}://{prefix}{self.authority}" + (f"/{self.path}" if self.path else "")

    def join(self, *parts: str) -> "Uri":
        """Return the URI of something below this one."""
        path = "/".join([self.path.rstrip("/"), *(part.strip("/") for part in parts)])
        return Uri(self.scheme, self.authority, path if self.scheme == "file" else path.lstrip("/"), self.is_dataset)


def parse(value: str, schemes: tuple[str, ...] = READABLE) -> Uri:
    """Parse `value`; raises ValueError with one sentence that says what is allowed."""
    for rule in rules(schemes):
        if not rule.holds(value):
            raise ValueError(rule.message)
    scheme, rest = value.split("://", 1)
    if scheme == "file":
        return Uri(scheme, "", rest)
    if scheme == "hf":
        is_dataset = rest.startswith("datasets/") and rest.count("/") >= 2
        owner, name, *below = rest.removeprefix("datasets/" if is_dataset else "").split("/", 2)
        return Uri(scheme, f"{owner}/{name}", "".join(below), is_dataset)
    authority, _, path = rest.partition("/")
    return Uri(scheme, authority, path)

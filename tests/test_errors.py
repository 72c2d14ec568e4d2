"""Each problem is one line, and stars replace credentials in every form in which libraries print them."""

import logging
import pickle
from urllib.parse import quote

import pytest

from gpt2.errors import UserError, one_line, without_password, without_secrets
from gpt2.tracking.tracker import Ended
from gpt2.validation import has_password
from tests.conftest import TINY, Workspace

SECRET = "t0k/3n:@x"


def test_each_problem_is_one_line():
    error = pickle.loads(pickle.dumps(UserError("a\nb", "c")))  # as joblib returns it
    assert error.problems == [r"a\nb", "c"]
    assert str(error) == "a\\nb\nc"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:SECRET@host/path", "https://***@host/path"),
        ("https:/user:SECRET@host", "https:/***@host"),  # pathlib
        ("/home/me/https:/user:SECRET@host/x", "/home/me/https:/***@host/x"),
        ("https:user:SECRET@host", "https:***@host"),
        ("user:SECRET@host:3128", "***@host:3128"),
        ("'user:SECRET@[::1]'", "'***@[::1]'"),
        ("//user:SECRET@host", "//***@host"),
        ("https://SECRET@host", "https://***@host"),  # a token alone
        ("https://SECRET:x-oauth-basic@host", "https://***@host"),
        ("amqp://:SECRET@host", "amqp://***@host"),
        ("GIT+SSH://user:SECRET@host", "GIT+SSH://***@host"),
        ("models--https:----user:SECRET@host", "models--https:----***@host"),
        (r"https:\/\/user:SECRET@host", r"https:\/\/***@host"),  # JSON
        ("PosixPath('https:/user:SECRET@host')", "PosixPath('https:/***@host')"),
        ("a=[https://host/x,https://user:SECRET@host]", "a=[https://***@host]"),
        ("postgresql+psycopg://me:SECRET@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql:/me:SECRET@host/db", "postgresql:/me:***@host/db"),
        ("[sqlite:///a.db,mysql://me:SECRET@host/db]", "[sqlite:///a.db,mysql://me:***@host/db]"),
        ("https://host/x?Token=SECRET&n=1", "https://host/x?Token=***&n=1"),
        ("?API_KEY=SECRET", "?API_KEY=***"),
        ("&X-Amz-Signature=SECRET", "&X-Amz-Signature=***"),
        ("host=h password = 'SECRET y' user=me", "host=h password = *** user=me"),
        ("""{'password': 'SECRET y', "hf_token": "SECRET"}""", """{'password': ***, "hf_token": ***}"""),
        ("Proxy-Authorization: Basic SECRET", "Proxy-Authorization: Basic ***"),
        ("{'authorization': 'Bearer SECRET'}", "{'authorization': 'Bearer ***'}"),
        ("wandb.api_key=SECRET", "wandb.api_key=***"),
        ("https:/SECRET@host:80/x", "https:/***@host:80/x"),
        ("https://user:SECRET@host/a@b", "https://***@b"),
        ("//user:SECRET@host/a", "//***@host/a"),
        ("login(token='01_SECRET', n=1)", "login(token=***, n=1)"),
        ("invalid bearer SECRET.SECRET", "invalid bearer ***"),
        ("secret = 0SECRET/SECRET", "secret = ***"),
    ],
    ids=str.split("url pathlib path no_slash no_scheme ipv6 no_scheme_slashes token basic amqp git hub json repr list")
    + str.split("database database_slash databases query query2 query3 words dict header headers override")
    + str.split("pathlib_token path_with_at slashes_path call bearer spaces"),
)
@pytest.mark.parametrize("secret", ["t0k3n", SECRET], ids=["simple", "signs"])
def test_credentials_are_starred(text, shown, secret):
    if "SECRET@" not in text or text.startswith("https:user"):  # elsewhere its signs would end the secret
        secret = "t0k3n"
    for begin, end in (("", ""), ("failed: ", " (again)"), ("first line\n", "\nthird line")):
        assert without_password(f"{begin}{text.replace('SECRET', secret)}{end}") == f"{begin}{shown}{end}"


@pytest.mark.parametrize("times", [1, 2])
def test_encoded_urls_are_starred(times):
    text = "https://user:t0k3n@host?token=t0k3n"
    for _ in range(times):
        text = quote(text, safe="")
    assert "t0k3n" not in without_password(text)
    assert "t0k3n" not in without_password(text.lower())
    assert "t0k3n" not in without_password(quote("https://user:t0k3n@host", safe=":/"))


URLS_WITHOUT_CREDENTIALS = [
    "https://host/a@b",
    "s3://b/k@v2",
    "https:/host/a@b",
    "https:\\/\\/host\\/a@b",
    "https%3A%2F%2Fhost%2Fa%40b",
    "http://host.org:8080/me@work/a@b?c=d@e",
    "http://[::1]:80/a@b",
    "https://host?mail=me@host.org",
    "https://host/#a@b",
    "https://host/@me/title",
    "git+https://host/owner/name@v1.2",
    "hf://datasets/owner/name@main/x.parquet",
    "sqlite:///home/me@work/x.db",
    "journal:///a@b",
    "file:///home/me@work/a",
    "/data//me@work/x.txt",
    "C:/Users/me@work/x.txt",
    "https://host/x?tokens=5&sort=token",
    "postgresql://USER:PASSWORD@HOST/NAME",
]
OTHER_TEXTS = [
    "a:b@c and 'x:y@z.txt', mailto:me@host.org, 12:30@work, data/a:b@c/d.txt",
    "token = x, a token = self.next() and login(token=token)",
    "data.files: no file matches 'data/token=x.txt' or 'my secret = a.txt'",
    "a bearer of news; auth = none; pass=1; sig=a",
    "postgresql://me@host/db, postgresql://USER:PASSWORD@HOST/NAME",
    "data.tokenizer=train inference.max_new_tokens=5 tokens=7",
    "prompt: token 5 is outside the vocabulary of a.pth (4 tokens)",
    "/home/me@work/x.txt: no such file; write to me@host.org, see https://host/x",
    "data.files: no file matches ['a:b/*.txt'] at 12:30",
    "{'eos_token': 50256, 'pad_token': '<pad>'}",
    "hydra/launcher@x=basic: a value with special characters needs quotes: key='a,b'",
    "resume with: python train.py resume=outputs/runs/gpt2/2026-11-29_23-53-24-986e train.learning_rate=1e-4",
]


def test_text_without_credentials_is_unchanged():
    texts = [*URLS_WITHOUT_CREDENTIALS, *OTHER_TEXTS]
    assert [without_password(text) for text in texts] == texts
    assert [without_password(f"a=['{text}', 'b']") for text in texts] == [f"a=['{text}', 'b']" for text in texts]


def test_urls_without_credentials_may_be_settings():
    assert [url for url in URLS_WITHOUT_CREDENTIALS if has_password([url]) or has_password(f"data.files=[{url}]")] == []
    for url in ("https://user:t0k3n@host/a", "https:/t0k3n@host", "s3://id:k/e:y@b/k", "https://host?token=t0k3n"):
        assert has_password(url), url


def test_known_secrets_are_starred_anywhere(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "0123456789")
    monkeypatch.setenv("HTTPS_PROXY", "user:pr/xy@host:3128")
    monkeypatch.setenv("MIRROR", "--index-url https://user:p%40ss@host")
    text = "a0123456789b, user pr/xy or pr%2Fxy, p@ss or p%40ss, my word"
    assert without_password(text, "postgresql://me:my word@host/db") == "a***b, user *** or ***, *** or ***, ***"


def test_long_text_is_searched_in_linear_time():
    """An expression that backtracks takes minutes for some of these."""
    for part in (
        "a",
        "http://",
        "a:",
        "x://y",
        "/",
        "user:",
        ":/@",
        "password=",
        "bearer ",
        "%25",
        "@",
        "a:b@",
        "token=",
    ):
        without_password(part * (60_000 // len(part)))
        without_password(part * (60_000 // len(part)) + "x@y")


def test_errors_reasons_and_log_lines_are_without_credentials(caplog, monkeypatch):
    from gpt2.runtime.console import LogRecord

    url = f"https:/user:{SECRET}@host"
    error = UserError(f"a: {url}", "b")
    assert (str(error), error.problems) == ("a: https:/***@host\nb", ["a: https:/***@host", "b"])
    assert one_line(OSError(f"a\n{url}")) == "a https:/***@host"
    assert Ended.by(OSError(url)).reason == "OSError: https:/***@host"
    assert without_secrets("mysql://me:word@host/x?a=b") == "mysql://***@host/x?a=***"
    factory = logging.getLogRecordFactory()
    logging.setLogRecordFactory(LogRecord)
    logging.getLogger("urllib3").warning("retrying %s", url, exc_info=OSError(url))
    logging.getLogger("gpt2").warning("token = self.next()", extra={"is_sample": True})
    logging.setLogRecordFactory(factory)
    assert caplog.messages == ["retrying https:/***@host", "token = self.next()"]
    assert "OSError: https:/***@host\n" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# The scripts

URL = f"https://user:{SECRET}@127.0.0.1:9/x"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train.py", [*TINY, f"data.dataset_name='{URL}'"]),
        ("train.py", [*TINY, f"data.files=['{URL}']"]),
        ("train.py", [*TINY, f"data.tokenizer='{URL}'"]),
        ("train.py", [*TINY, f"train.init_from='{URL}'"]),
        ("train.py", [*TINY, f"resume='{URL}'"]),
        ("train.py", [*TINY, f"hydra.run.dir='{URL}'"]),
        ("train.py", [*TINY, f"+new='{URL}'"]),
        ("train.py", [f"--url={URL}"]),
        ("train.py", [f"--cfg={URL}"]),
        ("train.py", ["-m", *TINY, f"data.dataset_name='{URL}','{URL}/y'"]),
        ("train.py", ["-m", *TINY, "hparams_search=optuna", f"hydra.sweeper.storage='{URL}'"]),
        ("train.py", ["-m", *TINY, "hparams_search=optuna", f"hydra.sweeper.storage='postgresql+psycopg2:{URL[6:]}'"]),
        ("evaluate.py", [f"checkpoint='{URL}'"]),
        ("generate.py", [f"checkpoint='{URL}'", "prompt=a"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[-1:]).partition("=")[0],
)
def test_credentials_in_an_argument_are_in_no_output(workspace: Workspace, script, arguments):
    done = workspace.start(script, *arguments)
    output = "".join(done.communicate(120))
    assert "Traceback" not in output
    assert done.wait() == 2
    assert len(output.splitlines()) == 1
    assert not found_in(workspace, output), output


def test_credentials_in_a_composed_configuration_are_not_printed(workspace: Workspace):
    storage = f"hydra.sweeper.storage='postgresql://me:{SECRET}@127.0.0.1:9/x'"
    prompt = f"sample_prompt='{URL}'"
    done = workspace.run("train.py", "--cfg", "all", *TINY, "hparams_search=optuna", storage, prompt)
    assert "postgresql://me:***@127.0.0.1:9/x" in done.stdout
    assert "sample_prompt: https://***@127.0.0.1:9/x" in done.stdout
    assert not found_in(workspace, done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("HTTPS_PROXY", ["evaluate.py", "checkpoint=foo/bar"]),
        ("ALL_PROXY", ["generate.py", "checkpoint=gpt2", "prompt=a"]),
        ("HF_ENDPOINT", ["train.py", "wandb=off"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_credentials_in_an_invalid_url_are_in_no_output(workspace: Workspace, name, arguments):
    workspace.environment[name] = f"http://user:{SECRET}@127.0.0.1:9"
    done = workspace.run(*arguments, expect=2)
    assert done.stderr.startswith(f"error: {name}: not the URL of a server, such as http://USER:PASSWORD@HOST:3128; ")
    assert not found_in(workspace, done.stdout + done.stderr)


def found_in(workspace: Workspace, output: str) -> list[str]:
    """The files of a workspace, and its output, that contain a part of the secret."""
    files = {str(path): path.read_bytes() for path in workspace.folder.rglob("*") if path.is_file()}
    names = {str(path): str(path).encode() for path in workspace.folder.rglob("*")}
    everything = [*files.items(), *names.items(), ("output", output.encode())]
    return [name for name, content in everything if b"t0k" in content]

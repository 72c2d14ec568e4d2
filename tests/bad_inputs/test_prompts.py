"""Binary prompts, files of prompts, and sampling options."""

from tests.bad_inputs.files import PROMPTS
from tests.bad_inputs.harness import check, rows

OPTIONS = [
    ("max_new_tokens=0", "0 is not a whole number of at least 1"),
    ("max_new_tokens=1e3", "Integer"),
    ("max_new_tokens=null", "not Optional"),
    ("temperature=-1", "-1.0 is not a finite number of at least 0"),
    ("temperature=nan", "nan is not"),
    ("temperature=warm", "Float"),
    ("top_p=1.1", "1.1 is not above 0 and at most 1"),
    ("min_p=2", "2.0 is not between 0 and 1"),
    ("repetition_penalty=0", "0.0 is not between 0.001 and 1000"),
    ("seed=9223372036854775808", "9223372036854775808 is not between 0 and 2^63 - 1"),
    ("do_sample=perhaps", "not a valid bool"),
    ("stop=['']", "an empty text matches everywhere"),
    ("stop=null", "inference.stop"),
    ("precision=int8", "['auto', 'fp32', 'bf16']"),
    ("heat=1", "Key 'heat'"),
]

LINES = [
    ("two sources", "generate prompt=x prompts_file=prompts/nothing.txt", "prompts_file: contradicts prompt"),
    ("a missing file", "generate prompts_file=nowhere.txt", "prompts_file: nowhere.txt cannot be read"),
    ("a folder", "generate prompts_file=folder", "prompts_file: folder"),
    ("a loop of links", "generate prompts_file=loop.txt", "prompts_file: loop.txt"),
    ("an empty name", "generate prompts_file=", "prompts_file: "),
    ("a list of files", "generate prompts_file=[a,b]", "prompts_file=[a,b]: "),
    ("a prompt of a sweep", "generate -m prompt=a,b", "-m: only train.py makes several runs"),
    ("a missing device", "generate prompt=x device=cuda:99", "device: there is no cuda"),
    ("an unknown device", "generate prompt=x device=tpu", "device: 'tpu' is none of auto"),
    ("samples without tokens", "train inference.max_new_tokens=0", "inference.max_new_tokens: 0 is not"),
]
FILE_WORDS = {
    "nothing.txt": "has no prompt",
    "blank_lines.txt": "has no prompt",
    "empty.jsonl": "has no prompt",
    "latin1.txt": "is not UTF-8",
    "utf16_prompts.txt": "is not UTF-8",
    "not_json.jsonl": "line 2: not JSON",
}


@rows([(option, f'generate prompt=x "inference.{option}"', expected) for option, expected in OPTIONS])
def test_sampling_options(place, row):
    check(place, row._replace(expected=f"inference.{row.what.split('=')[0]} ... {row.expected}"))


@rows(LINES)
def test_prompts(place, row):
    check(place, row)


@rows([(name, f"generate prompts_file=prompts/{name}", FILE_WORDS.get(name, "")) for name in PROMPTS])
def test_files_of_prompts(place, row):
    check(place, row._replace(expected=f"prompts_file: prompts/{row.what} ... {row.expected}"))

"""Train a student by a method that reads its teacher's hidden states, from their cache or from the running teacher."""

from kdbench import cli, files, teacher
from kdbench.alignment import vocabulary
from kdbench.alignment.pairs import Alignment
from kdbench.alignment.spelling import Spelling
from kdbench.settings import Hardware
from kdbench.training import arguments
from kdbench.training.run import train


def main():
    parser = arguments.parser(__doc__)
    parser.add_argument("--teacher", required=True, metavar="FOLDER", help="the teacher")
    parser.add_argument("--teacher-cache", metavar="FOLDER", help="its cached states; without, it runs in every step")
    parser.add_argument("--alignment", metavar="FOLDER", help="pairs of tokens, for methods that pair or cut by bytes")
    parser.add_argument("--spelling", metavar="FOLDER", help="edit distances of tokens, for methods that compare them")
    parser.add_argument(
        "--vocabulary", metavar="FOLDER", help="relation of the vocabularies, for methods that ask for it"
    )
    options = parser.parse_args()
    tokens = files.read_manifest(options.train, "tokens")
    if options.teacher_cache:
        factory, shape = teacher.from_cache(options.teacher_cache, options.teacher, tokens["fingerprint"])
    else:
        factory, shape = teacher.from_model(options.teacher, Hardware.model_validate_json(options.hardware))
    of_text = {}
    if options.alignment:
        of_text["alignment"] = Alignment.load(options.alignment, expected_tokens=tokens["fingerprint"])
    if options.spelling:
        of_text["spelling"] = Spelling.load(options.spelling, expected_tokens=tokens["fingerprint"])
    if options.vocabulary:
        of_text["vocabulary"] = vocabulary.load(options.vocabulary, tokens.get("tokenizers", {}))
    train(arguments.job(options, teacher=factory, teacher_shape=shape, **of_text))


cli.run(main)

"""Task files of lm-evaluation-harness, made of the reference model's own problems."""

import json

from lynx.reference_model import load_reference_model

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: {kind}
metadata: {{version: 2.0}}
tag: of_the_reference_model
"""
GENERATED = r"""
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\n\n"], max_gen_toks: 48}
filter_list:
  - name: answer
    filter:
      - {function: regex, regex_pattern: 'Answer: (-?\d+)\s*$'}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOSEN = """
target_delimiter: ""
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLED = """
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list:
  - {metric: bits_per_byte}
"""
SINGLE = """
doc_to_text: "{{prompt}}Answer:"
target_delimiter: ""
doc_to_choice: ["0", "1"]
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
KINDS = {
    "made_of_problems": ("generate_until", GENERATED),
    "made_of_choices": ("multiple_choice", CHOSEN),
    "made_of_texts": ("loglikelihood_rolling", ROLLED),
    "made_of_digits": ("multiple_choice", SINGLE),
}


def short_problems(count):
    """Problems with short solutions, of several lengths."""
    found = [problem for problem in load_reference_model().problems if len(problem.solution) <= 44]
    return found[:count]


def write_tasks(folder, count=12):
    """Write a YAML file for each kind of task, with the data beside them, and return their paths by name."""
    data, paths = folder / "problems.jsonl", {}
    rows = []
    for place, problem in enumerate(short_problems(count)):
        wrong = problem.solution.rpartition(" ")[0] + f" {int(problem.answer) + 1}\n"
        choices = [problem.solution, wrong] if place % 2 == 0 else [wrong, problem.solution]
        rows.append({"prompt": problem.prompt, "answer": problem.answer, "choices": choices, "right": place % 2})
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, (kind, rest) in KINDS.items():
        paths[name] = folder / f"{name}.yaml"
        head = TASK.format(name=name, data=data, cache=folder / "cache", kind=kind)
        paths[name].write_text(head + rest, encoding="utf-8")
    return paths

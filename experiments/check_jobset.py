"""Checks deploy/jobset.yaml against the schema of JobSet, which also has the fields of jobs and pods.

  pip install jsonschema
  python -m experiments.check_jobset jobset.x-k8s.io_jobsets.yaml

The argument is that file of https://github.com/kubernetes-sigs/jobset, in config/components/crd/bases. A field that the
schema does not know is a mistake here, as for `kubectl --dry-run=server`.
"""

import pathlib
import sys
from typing import Any

import yaml

FILE = pathlib.Path(__file__).parent.parent / 'deploy/jobset.yaml'


def made_strict(schema: Any) -> Any:
  """Returns a schema of Kubernetes as plain JSON Schema that refuses unknown fields."""
  if isinstance(schema, list):
    return [made_strict(part) for part in schema]
  if not isinstance(schema, dict):
    return schema
  if schema.get('x-kubernetes-int-or-string'):
    return {'type': ['integer', 'string']}
  schema = {name: made_strict(part) for name, part in schema.items()}
  if 'properties' in schema and not schema.get('x-kubernetes-preserve-unknown-fields'):
    schema.setdefault('additionalProperties', False)
  return schema


def main(path: str) -> None:
  """Prints each mistake, and exits with status 1 if there is one."""
  import jsonschema

  definition = yaml.safe_load(pathlib.Path(path).read_text())
  (version,) = definition['spec']['versions']
  schema = made_strict(version['schema']['openAPIV3Schema'])
  schema['properties']['metadata'] = {'type': 'object'}  # the schema leaves it to Kubernetes
  mistakes = list(jsonschema.Draft202012Validator(schema).iter_errors(yaml.safe_load(FILE.read_text())))
  for mistake in mistakes:
    print(f'{mistake.json_path}: {mistake.message}')
  print(f'{FILE.name} beside {definition["metadata"]["name"]}, {version["name"]}: {len(mistakes)} mistakes')
  sys.exit(bool(mistakes))


if __name__ == '__main__':
  main(*sys.argv[1:])

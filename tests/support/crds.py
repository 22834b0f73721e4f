# SPDX-License-Identifier: Apache-2.0
"""Kubernetes resources against the schemas of their CustomResourceDefinitions.

The definitions are Kubeflow's, hundreds of kB each. Here is the part that the examples go through,
made from the whole by ``python tests/support/crds.py CRD.yaml MANIFEST.yaml``, which prints it:
a schema keeps the names of all its fields, but what is below a field that the manifest does not
have is left out. After a change of a manifest make it again.
"""

from __future__ import annotations

import json
import re
import sys

import yaml

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def schema_of(definition, version):
    """Schema of one version of a CustomResourceDefinition."""
    [found] = [each for each in definition["spec"]["versions"] if each["name"] == version]
    return found["schema"]["openAPIV3Schema"]


def trimmed(schema, values):
    """The part of a schema that ``values``, things of that schema, go through."""
    kept = {
        key: schema[key]
        for key in ("type", "required", "enum", "pattern", "minimum", "x-kubernetes-int-or-string")
        if key in schema
    }
    if "properties" in schema:
        kept["properties"] = {
            name: trimmed(below, found) if (found := [v[name] for v in values if name in v]) else {}
            for name, below in schema["properties"].items()
        }
    if isinstance(schema.get("additionalProperties"), dict):
        below = [each for value in values for each in value.values()]
        kept["additionalProperties"] = trimmed(schema["additionalProperties"], below)
    if "items" in schema:
        kept["items"] = trimmed(schema["items"], [each for value in values for each in value])
    return kept


def errors(schema, value, path=""):
    """What is wrong with a value: unknown or missing fields, wrong types, values out of range."""
    expected = TYPES.get(schema.get("type"), object)
    if schema.get("x-kubernetes-int-or-string"):
        expected = (int, str)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is int):
        return [f"{path}: {value!r} is not of type {schema.get('type', 'int or string')}"]
    found = [
        f"{path}: {name} is missing" for name in schema.get("required", ()) if name not in value
    ]
    if value not in schema.get("enum", [value]):
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{path}: {value} is below {schema['minimum']}")
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        found.append(f"{path}: {value!r} is not of the form {schema['pattern']}")
    for name, below, each in _below(schema, value):
        if below is None:
            found.append(f"{path}: {name} is not known")
        else:
            found += errors(below, each, f"{path}.{name}")
    return found


def _below(schema, value):
    """Name, schema (None: there is none) and value of what is directly in a value."""
    if "items" in schema:
        return [(str(i), schema["items"], each) for i, each in enumerate(value)]
    if "properties" in schema:
        return [(name, schema["properties"].get(name), each) for name, each in value.items()]
    if "additionalProperties" in schema:
        return [(name, schema["additionalProperties"], each) for name, each in value.items()]
    return []


def main(definition_path, *manifest_paths):
    with open(definition_path) as file:
        definition = yaml.safe_load(file)
    documents = []
    for path in manifest_paths:
        with open(path) as file:
            documents += yaml.safe_load_all(file)
    kind = definition["spec"]["names"]["kind"]
    documents = [each for each in documents if each["kind"] == kind]
    version = documents[0]["apiVersion"].partition("/")[2]
    whole = schema_of(definition, version)
    for document in documents:
        for error in errors(whole, document):
            print(error, file=sys.stderr)
    group = definition["spec"]["group"]
    print(
        json.dumps(
            {"kind": kind, "apiVersion": f"{group}/{version}", "schema": trimmed(whole, documents)}
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A template, added as CONTRIBUTING.md describes: `Q: 2+2`, `A: 4` on lines of their own."""

from rwkv_miss.data.templates import Template

TEMPLATE = Template(name="toy", user="Q: {content}\n", prompt="A:", answer=" {content}", end="\n", stops=("\nQ:",))

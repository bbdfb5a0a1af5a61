"""Hugging Face's own server, for models with memories: python serve.py DIR --port 8000"""

import sys

import transformers
from transformers.cli.transformers import main

from pkmem.lm.huggingface import PkmemForCausalLM

transformers.PkmemForCausalLM = PkmemForCausalLM  # where the server looks for a model's class
sys.argv[1:1] = ["serve"]
main()

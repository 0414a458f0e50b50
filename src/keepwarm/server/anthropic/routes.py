"""`/v1/messages` and `/v1/messages/count_tokens`."""

from fastapi import APIRouter

router = APIRouter(tags=["Anthropic"])

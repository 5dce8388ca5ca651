//! One choice of an answer: a request of its own in the engine, and how much of its text is written.

use std::task::{Context, Poll};

use shared::tokens::{ContentId, TokenId};
use shared::trace::Trail;
use tokio::sync::mpsc::UnboundedReceiver;

use super::pacing::Delivery;
use super::stop::{Keep, Stops, TextEnd};
use crate::core::engine::{RejectReason, RequestKey, RequestStats};
use crate::core::facts::EngineFact;
use crate::core::sequence::FinishReason;
use crate::core::tokenizer::Tokenizer;

/// A choice under way. Whoever drops it early aborts its request.
pub(super) struct Choice {
    pub(super) key: RequestKey,
    pub(super) trail: Trail<EngineFact>,
    /// Which prompt it answers.
    pub(super) prompt: usize,
    pub(super) text: ChoiceText,
    output: UnboundedReceiver<Delivery>,
    /// Received and not looked at.
    held: Option<Delivery>,
    /// Output tokens received; those written are in `text`.
    pub(super) tokens: u32,
    pub(super) end: Option<Finish>,
    /// Whether its first and its last bytes were written.
    pub(super) begun: bool,
    pub(super) written: bool,
}

/// How a choice ended.
#[derive(Clone, Debug)]
pub(super) struct Finish {
    pub(super) reason: FinishReason,
    pub(super) stats: Box<RequestStats>,
}

/// Why there will be no more of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The engine did not take it.
    Rejected(RejectReason),
    /// The engine failed with it.
    Failed,
    /// The engine is dead.
    Dead,
}

impl Choice {
    pub(super) fn new(
        key: RequestKey,
        trail: Trail<EngineFact>,
        prompt: usize,
        text: ChoiceText,
        output: UnboundedReceiver<Delivery>,
    ) -> Choice {
        Choice { key, trail, prompt, text, output, held: None, tokens: 0, end: None, begun: false, written: false }
    }

    /// Waits until the engine has taken the request or refused it.
    pub(super) async fn taken(&mut self) -> Result<(), Broken> {
        match self.output.recv().await {
            Some(Delivery::Rejected(reason)) => Err(Broken::Rejected(reason)),
            None => Err(Broken::Dead),
            first @ Some(Delivery::Taken | Delivery::Tokens(_) | Delivery::Finished { .. }) => {
                self.held = first;
                Ok(())
            }
        }
    }

    /// Waits for the end.
    pub(super) async fn finished(&mut self) -> Result<(), Broken> {
        while self.end.is_none() {
            let delivery = match self.held.take() {
                Some(held) => Some(held),
                None => self.output.recv().await,
            };
            self.take(delivery)?;
        }
        Ok(())
    }

    /// Takes in everything that is there.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Result<(), Broken> {
        while self.end.is_none() {
            let delivery = match self.held.take() {
                Some(held) => Some(held),
                None => match self.output.poll_recv(cx) {
                    Poll::Ready(delivery) => delivery,
                    Poll::Pending => return Ok(()),
                },
            };
            self.take(delivery)?;
        }
        Ok(())
    }

    fn take(&mut self, delivery: Option<Delivery>) -> Result<(), Broken> {
        match delivery {
            Some(Delivery::Taken) => {}
            Some(Delivery::Tokens(n)) => self.tokens += n,
            Some(Delivery::Finished { tokens, reason, stats }) => {
                self.tokens += tokens;
                self.end = Some(Finish { reason, stats });
                if reason == FinishReason::Error {
                    return Err(Broken::Failed);
                }
            }
            Some(Delivery::Rejected(reason)) => return Err(Broken::Rejected(reason)),
            None => return Err(Broken::Dead),
        }
        Ok(())
    }

    /// Whether there is something to write.
    pub(super) fn has_news(&self) -> bool {
        !self.written && (self.end.is_some() || self.tokens > self.text.tokens)
    }

    /// Whether the engine may still be at work on it.
    pub(super) fn is_open(&self) -> bool {
        self.end.is_none()
    }

    /// How its text ends, if it does.
    pub(super) fn text_end(&self) -> Option<TextEnd> {
        let finish = self.end.as_ref()?;
        Some(self.text.stops.end(self.tokens, self.text.last_of(self.tokens), finish.reason))
    }
}

/// The text of a choice, of which a part is written.
#[derive(Debug)]
pub(super) struct ChoiceText {
    pub(super) tokenizer: Tokenizer,
    pub(super) content: ContentId,
    pub(super) stops: Stops,
    /// Tokens whose text is written or waits in `pending`.
    pub(super) tokens: u32,
    /// Bytes written.
    shown: usize,
    /// Text that may be the beginning of a stop string.
    pending: String,
    /// Characters of the tokens that log probabilities were told of.
    pub(super) offset: usize,
}

impl ChoiceText {
    pub(super) fn new(tokenizer: Tokenizer, content: ContentId, stops: Stops) -> ChoiceText {
        ChoiceText { tokenizer, content, stops, tokens: 0, shown: 0, pending: String::new(), offset: 0 }
    }

    fn last_of(&self, tokens: u32) -> Option<TokenId> {
        Some(self.tokenizer.filler(self.content, u64::from(tokens.checked_sub(1)?)))
    }

    /// Token ids `from..to`.
    pub(super) fn ids(&self, from: u32, to: u32) -> impl Iterator<Item = TokenId> + '_ {
        (from..to).map(|i| self.tokenizer.filler(self.content, u64::from(i)))
    }

    /// Writes the text of the tokens up to `to` as far as it is known to be text of the answer.
    pub(super) fn write(&mut self, to: u32, keep: Option<Keep>, out: &mut String) {
        let from = std::mem::replace(&mut self.tokens, to);
        let all = matches!(keep, None | Some(Keep::All));
        if all && self.stops.hold() == 0 {
            let before = out.len();
            self.tokenizer.push_filler(self.content, from, to, out);
            self.shown += out.len() - before;
            return;
        }
        self.tokenizer.push_filler(self.content, from, to, &mut self.pending);
        let most = self.pending.len();
        let ready = match keep {
            None => most.saturating_sub(self.stops.hold()),
            Some(Keep::All) => most,
            Some(Keep::Bytes(bytes)) => bytes.saturating_sub(self.shown).min(most),
            Some(Keep::ButLast) => {
                let last = to.checked_sub(1).map_or(0, |i| self.tokenizer.filler_bytes(self.content, i));
                most.saturating_sub(last)
            }
        };
        out.push_str(&self.pending[..ready]);
        self.shown += ready;
        self.pending.drain(..ready);
    }
}

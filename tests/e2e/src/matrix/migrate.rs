//! The decode node of a request is killed at each of its tokens: the answer goes on as if nothing had been.

use std::time::{Duration, Instant};

use super::case::{judge, next, party};
use super::{Asked, Matrix};
use crate::WAIT_MAX;
use crate::golden::rows;
use crate::parts::Plan;

/// Tokens of which each is the last before a loss, in turn.
pub const LOSSES: usize = 64;
/// Tokens of each answer: the last loss leaves some to be done.
const ANSWER_TOKENS: usize = 80;
const PROMPT_TOKENS: usize = 100;
/// Prompts of the reference for the model, those of the repository's own few among them.
const MODEL_PROMPTS: [&str; 4] = ["code", "capital", "block_17", "chat_turn2"];

/// What one loss cost.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    /// Tokens computed again.
    pub recomputed: u64,
    /// How much longer than undisturbed the answer took.
    pub late: Duration,
}

impl Matrix {
    /// A greedy and a sampled request with their undisturbed answers, in a cluster without delays.
    ///
    /// # Errors
    /// An undisturbed answer is not whole.
    pub async fn migrants(&mut self) -> Result<[Asked; 2], String> {
        self.parts.relays.set(|weather| weather.delay.clear());
        let bodies = [0, 1].map(|number| self.body(number, PROMPT_TOKENS, ANSWER_TOKENS));
        let [greedy, sampled] = bodies;
        Ok([self.undisturbed(greedy).await?, self.undisturbed(sampled).await?])
    }

    /// A cluster with the demo's model in f32, and the reference's prompts whose answers are long enough that only a few tokens of them
    /// are left to near ties that nobody knows of.
    ///
    /// # Errors
    /// It does not serve, or an undisturbed answer is not whole.
    pub async fn with_model() -> Result<(Self, Vec<Asked>), String> {
        let mut matrix =
            Self::of(&Plan { model: crate::real_model(), checksum_us: None, kv_blocks: 512, step_tokens: 256 }).await?;
        let mut all = Vec::new();
        for row in rows().into_iter().filter(|row| MODEL_PROMPTS.contains(&row.name.as_str())) {
            let body = matrix.greedy(&row.prompt_ids, ANSWER_TOKENS);
            all.push(Asked { reference: Some(row), ..matrix.undisturbed(body).await? });
        }
        Ok((matrix, all))
    }

    /// Kills the decode node of a request as soon as the client has `token` tokens.
    ///
    /// # Errors
    /// The answer is not the undisturbed one.
    pub async fn migrate(&mut self, asked: &Asked, token: usize) -> Result<Loss, String> {
        self.parts.whole(WAIT_MAX).await?;
        let mut lines = self.parts.follow();
        let begun = Instant::now();
        let mut client = self.ask(&asked.body).await?;
        let placed = next(&mut lines, &[": placed attempt="]).await?;
        let decode = party(&self.parts, &placed, "decode=")?;
        client.read(token, WAIT_MAX).await?;
        if client.end.is_some() {
            return Err("the answer ended before the loss".into());
        }
        let signal = self.parts.kill(decode).await?;
        client.read(usize::MAX, WAIT_MAX).await?;
        let took = begun.elapsed();
        self.parts.spawn(decode)?;
        judge(&client, asked)?;
        let end = client.end.as_ref().ok_or("no end")?;
        let number = |key: &str| end["millrace"][key].as_u64().unwrap_or_default();
        if signal != 9 || number("attempts") < 2 {
            return Err(format!("nothing was lost: signal {signal}, {end}"));
        }
        Ok(Loss { recomputed: number("recomputed_tokens"), late: took.saturating_sub(asked.took) })
    }
}

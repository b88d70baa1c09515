//! A short hand-over alone, and while a long one is under way on the same slow link ([`network::shape`]): how long the client of each waits from
//! the first token to the second. The KV of the long one is at the prefill node already, and only there, so all of it leaves at once; short prompts are
//! computed in next to no time (the checksum engine, with a model's KV), which is enough to hide a short hand-over alone. So beside a long one the link is what both
//! wait for.

use std::path::Path;

use anyhow::Result;

use crate::cluster::{Cluster, Tokens, unique_prompt};
use crate::exposed::{gap_ms, next_ms};
use crate::millload::network;
use crate::report::{Row, median};

/// Speed of the link.
const GBIT: u32 = 1;
/// Tokens of a short prompt, and of a long one.
const SHORT: usize = 128;
const LONG: usize = 8000;

/// Measures `runs` times each. Call it inside a namespace ([`network::inside`]).
///
/// # Errors
/// No namespace, no shaping, or the cluster fails.
pub async fn measure(model: &Path, runs: usize, out: &dyn Fn(Row)) -> Result<()> {
    network::shape(GBIT).await?;
    let cluster = Cluster::start_with(model, "bf16", 1, &["--route", "split", "--checksum-engine", "0"]).await?;
    gap_ms(&cluster, SHORT).await?; // opens the link
    let (mut alone, mut shared, mut long_alone, mut long_shared) = (vec![], vec![], vec![], vec![]);
    for _ in 0..runs {
        alone.push(gap_ms(&cluster, SHORT).await?);
        long_alone.push(next_ms(&mut begin_long(&cluster).await?).await?);
        let (short, long) = both(&cluster).await?;
        shared.extend(short);
        long_shared.push(long);
    }
    cluster.stop().await?;
    let case = format!("{GBIT} Gb/s, {SHORT} tokens");
    let ratio = shared.iter().map(|gap| gap / median(&alone)).collect();
    out(Row::new(format!("{case} alone, first to second token, ms"), alone));
    out(Row::new(format!("{case} beside {LONG}, first to second token, ms"), shared));
    out(Row::new(format!("{case} beside {LONG} / alone"), ratio));
    let ratio = long_shared.iter().zip(&long_alone).map(|(shared, alone)| shared / alone).collect();
    out(Row::new(format!("{GBIT} Gb/s, {LONG} tokens alone, first to second token, ms"), long_alone));
    out(Row::new(format!("{GBIT} Gb/s, {LONG} tokens beside short ones / alone"), ratio));
    Ok(())
}

/// The gaps of short prompts that were answered while the KV of a long one was on its way, one after the other, and the long one's gap.
async fn both(cluster: &Cluster) -> Result<(Vec<f64>, f64)> {
    let mut answer = begin_long(cluster).await?;
    let long = next_ms(&mut answer);
    tokio::pin!(long);
    let mut gaps = Vec::new();
    loop {
        tokio::select! {
            biased;
            gap = &mut long => return Ok((gaps, gap?)),
            gap = gap_ms(cluster, SHORT) => gaps.push(gap?),
        }
    }
}

/// A long answer after its first token. An answer of one token leaves its prompt's KV at the prefill node.
async fn begin_long(cluster: &Cluster) -> Result<Tokens> {
    let prompt = unique_prompt(LONG);
    cluster.ask(&prompt, 1).await?.next().await?;
    let mut answer = cluster.ask(&prompt, 2).await?;
    answer.next().await?;
    Ok(answer)
}

//! The engine's thread: takes one step at a time, reports each finished layer and the result. It decides nothing.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use millrace_core::engine::{Engine, EngineError, Sampled, Step};
use millrace_core::node::Input;
use tokio::sync::mpsc;

use super::event::Event;

/// Hands steps to the engine; at most one is ever in flight.
pub(super) struct Compute {
    steps: SyncSender<Step>,
}

impl Compute {
    /// Starts the thread. It ends when this handle is dropped.
    pub(super) fn start(engine: Box<dyn Engine>, events: mpsc::Sender<Event>) -> std::io::Result<Self> {
        let (steps, inbox) = sync_channel(1);
        std::thread::Builder::new().name("engine".into()).spawn(move || run(engine, &inbox, &events))?;
        Ok(Self { steps })
    }

    /// Begins a step. False when the engine's thread is gone.
    pub(super) fn begin(&self, step: Step) -> bool {
        self.steps.try_send(step).is_ok()
    }
}

fn run(mut engine: Box<dyn Engine>, inbox: &Receiver<Step>, events: &mpsc::Sender<Event>) {
    while let Ok(step) = inbox.recv() {
        let started = Instant::now();
        let result = guarded(engine.as_mut(), &step, events);
        let elapsed_us = started.elapsed().as_micros() as u64;
        if events.blocking_send(Event::Node(Input::Stepped { result, elapsed_us })).is_err() {
            return;
        }
    }
}

/// A panic inside the engine fails the step, not the node: its sequences end with an error and the next step starts afresh.
fn guarded(engine: &mut dyn Engine, step: &Step, events: &mpsc::Sender<Event>) -> Result<Vec<Sampled>, EngineError> {
    let mut on_layer = |layer| {
        // A full or closed queue only delays the hand-over of this layer: `Computed` makes every layer ready.
        let _ = events.try_send(Event::Node(Input::Layer(layer)));
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| engine.step(step, &mut on_layer)))
        .unwrap_or_else(|_| Err(EngineError("the engine panicked in this step".into())))
}

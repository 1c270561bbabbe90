import Foundation
import MobileMMKit
import Observation

/// One line of the conversation as it is shown.
struct ChatLine: Identifiable {
    enum Content {
        case text(String)
        case picture(PixelRaster, String)
        case sketch(PixelRaster, String)
    }

    let id = UUID()
    let isQuestion: Bool
    var content: Content
}

/// The conversation on the screen: a ``Session``, its answers as they come, and how fast.
@MainActor
@Observable
final class ChatModel {
    private(set) var lines: [ChatLine] = []
    private(set) var isAnswering = false
    private(set) var isReady = false
    private(set) var rate = ""
    private(set) var lowMemory = false
    var failure: String?
    private var session: Session?
    private var answer: Task<Void, Never>?

    func begin(_ session: Session) {
        end()
        (self.session, isReady) = (session, true)
    }

    func end() {
        answer?.cancel()
        (session, isReady, lines, rate) = (nil, false, [], "")
    }

    /// Shows a picture; it goes with the next question. `data` is a file's content, of any kind the system reads.
    func look(at data: Data) async {
        guard let session else { return }
        do {
            let picture = try await Task.detached { try PictureFile.decode(data) }.value
            try await session.lookAt(picture)
            lines.append(ChatLine(isQuestion: true, content: .picture(picture, "Your picture")))
        } catch {
            failure = oneLine(error)
        }
    }

    func ask(_ question: String) {
        guard let session, !isAnswering else { return }
        lines.append(ChatLine(isQuestion: true, content: .text(question)))
        (isAnswering, failure) = (true, nil)
        answer = Task { [weak self] in
            do {
                for try await piece in session.stream(question) { self?.show(piece) }
            } catch {
                self?.failure = oneLine(error)
            }
            let stats = await session.stats
            if Memory.isLow { await session.release() }
            self?.finish(stats)
        }
    }

    /// Stops the answer; what was said by then stays.
    func stop() { session?.cancel() }

    func forget() async {
        await session?.reset()
        (lines, rate, failure) = ([], "", nil)
    }

    private func show(_ piece: Piece) {
        switch piece {
        case .text(let text):
            if let last = lines.indices.last, !lines[last].isQuestion, case .text(let before) = lines[last].content {
                lines[last].content = .text(before + text)
            } else {
                lines.append(ChatLine(isQuestion: false, content: .text(text)))
            }
        case .drawing(let drawing):
            refine(.picture(drawing.picture, "Seed \(drawing.seed)"))
        case .sketch(let sketch):
            refine(.sketch(sketch.picture, "Step \(sketch.step) of \(sketch.steps)"))
        }
    }

    /// Shows a picture in the place of the sketch before it, if there is one.
    private func refine(_ content: ChatLine.Content) {
        if let last = lines.indices.last, case .sketch = lines[last].content {
            lines[last].content = content
        } else {
            lines.append(ChatLine(isQuestion: false, content: content))
        }
    }

    private func finish(_ stats: Stats?) {
        isAnswering = false
        // Of a drawing that was stopped nothing is remembered.
        if let last = lines.last, case .sketch = last.content { lines.removeLast() }
        lowMemory = Memory.isLow
        if let stats {
            rate = String(format: "%.1f tokens/s, first after %.2f s", stats.decodeRate, stats.ttft)
        }
    }
}

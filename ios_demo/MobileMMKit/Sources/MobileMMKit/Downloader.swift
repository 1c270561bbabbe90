import Foundation

#if canImport(FoundationNetworking)
    import FoundationNetworking
#endif

/// Fetches files over HTTP straight to disk, from where they broke off.
final class Downloader: Sendable {
    private static let tries = 3

    /// Appends to the file what it lacks. Throws ``MobileMMError`` naming the address, when the server has more than
    /// `most` bytes, does not have it (unless `optional`), or breaks off three times.
    func fetch(
        _ address: URL, to file: URL, most: Int, optional: Bool = false,
        progress: @escaping @Sendable (Int) -> Void = { _ in }
    ) async throws {
        for attempt in 1...Self.tries {
            let have = (try? FileManager.default.attributesOfItem(atPath: file.path)[.size] as? Int) ?? 0
            if have > most { try FileManager.default.removeItem(at: file) }
            if have == most && most > 0 { return progress(most) }
            do {
                try Task.checkCancellation()
                return try await Transfer(address, file, from: have > most ? 0 : have, most, optional, progress).run()
            } catch let error as URLError where attempt < Self.tries && error.code != .cancelled {
                continue
            } catch let error as URLError where error.code == .cancelled {
                throw CancellationError()
            } catch let error as URLError {
                throw MobileMMError("\(address): broke off (\(oneLine(error))); start again to go on")
            }
        }
    }
}

/// One request, its answer written as it comes. Everything but `run` happens on the session's own queue.
private final class Transfer: NSObject, URLSessionDataDelegate, @unchecked Sendable {
    private let request: URLRequest
    private let address: URL
    private let file: URL
    private let most: Int
    private let optional: Bool
    private let progress: @Sendable (Int) -> Void
    private var at: Int
    private var handle: FileHandle?
    private var fault: (any Error)?
    private var done: CheckedContinuation<Void, any Error>?

    init(
        _ address: URL, _ file: URL, from start: Int, _ most: Int, _ optional: Bool,
        _ progress: @escaping @Sendable (Int) -> Void
    ) {
        (self.address, self.file, self.most, self.optional, self.progress) = (address, file, most, optional, progress)
        at = start
        var request = URLRequest(url: address, cachePolicy: .reloadIgnoringLocalCacheData, timeoutInterval: 30)
        if start > 0 { request.setValue("bytes=\(start)-", forHTTPHeaderField: "Range") }
        self.request = request
    }

    func run() async throws {
        let session = URLSession(configuration: .ephemeral, delegate: self, delegateQueue: nil)
        defer { session.finishTasksAndInvalidate() }
        let task = session.dataTask(with: request)
        try await withTaskCancellationHandler {
            try await withCheckedThrowingContinuation { continuation in
                done = continuation
                task.resume()
            }
        } onCancel: {
            task.cancel()
        }
    }

    func urlSession(
        _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
        completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
    ) {
        do {
            try begin(response)
            completionHandler(handle == nil ? .cancel : .allow)
        } catch {
            fault = error
            completionHandler(.cancel)
        }
    }

    private func begin(_ response: URLResponse) throws {
        let status = (response as? HTTPURLResponse)?.statusCode ?? 0
        if status == 404 && optional { return }
        switch status {
        case 206: break
        // A server that knows no ranges sends the whole.
        case 200: at = 0
        default: throw MobileMMError("\(address): the server answers with \(status)")
        }
        if !FileManager.default.fileExists(atPath: file.path) {
            _ = FileManager.default.createFile(atPath: file.path, contents: nil)
        }
        let handle = try FileHandle(forWritingTo: file)
        try handle.truncate(atOffset: UInt64(at))
        self.handle = handle
    }

    func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
        do {
            at += data.count
            if at > most { throw MobileMMError("\(address): is longer than the \(most) bytes that it may have") }
            try handle?.write(contentsOf: data)
            progress(at)
        } catch {
            fault = fault ?? error
            dataTask.cancel()
        }
    }

    func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: (any Error)?) {
        try? handle?.close()
        if let fault {
            done?.resume(throwing: fault)
        } else if let error, !(optional && handle == nil) {
            done?.resume(throwing: error)
        } else {
            done?.resume()
        }
        done = nil
    }
}

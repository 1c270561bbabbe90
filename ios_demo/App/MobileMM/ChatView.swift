import MobileMMKit
import PhotosUI
import SwiftUI

struct ChatView: View {
    @Bindable var chat: ChatModel
    @State private var question = ""
    @State private var picked: PhotosPickerItem?
    @State private var showsCamera = false

    var body: some View {
        NavigationStack {
            VStack {
                conversation
                if let failure = chat.failure {
                    Text(failure).font(.footnote).foregroundStyle(.red).accessibilityLabel("Error: \(failure)")
                }
                if chat.lowMemory {
                    Text("Little memory is left: parts are loaded anew for each question.").font(.footnote)
                }
                if !chat.rate.isEmpty { Text(chat.rate).font(.footnote).foregroundStyle(.secondary) }
                entry
            }
            .padding()
            .navigationTitle("mobilemm")
            .toolbar {
                ToolbarItem(placement: .primaryAction) {
                    Button("New conversation", systemImage: "square.and.pencil") { Task { await chat.forget() } }
                        .disabled(chat.isAnswering)
                }
            }
            .sheet(isPresented: $showsCamera) {
                CameraView { data in Task { await chat.look(at: data) } }
            }
            .onChange(of: picked) { _, item in
                guard let item else { return }
                Task {
                    if let data = try? await item.loadTransferable(type: Data.self) { await chat.look(at: data) }
                    picked = nil
                }
            }
        }
    }

    private var conversation: some View {
        ScrollView {
            LazyVStack(alignment: .leading, spacing: 12) {
                if !chat.isReady { Text("Import a bundle under Models first.").foregroundStyle(.secondary) }
                ForEach(chat.lines) { LineView(line: $0) }
            }
        }
        .defaultScrollAnchor(.bottom)
    }

    private var entry: some View {
        HStack {
            PhotosPicker(selection: $picked, matching: .images) {
                Image(systemName: "photo").accessibilityLabel("Choose a picture")
            }
            if CameraView.isAvailable {
                Button("Take a picture", systemImage: "camera") { showsCamera = true }.labelStyle(.iconOnly)
            }
            TextField("Ask about it", text: $question, axis: .vertical).textFieldStyle(.roundedBorder).onSubmit(send)
            if chat.isAnswering {
                Button("Stop", systemImage: "stop.circle.fill") { chat.stop() }.labelStyle(.iconOnly)
            } else {
                Button("Send", systemImage: "arrow.up.circle.fill", action: send)
                    .labelStyle(.iconOnly)
                    .disabled(question.isEmpty || !chat.isReady)
            }
        }
        .disabled(!chat.isReady)
    }

    private func send() {
        let text = question.trimmingCharacters(in: .whitespacesAndNewlines)
        if text.isEmpty { return }
        question = ""
        chat.ask(text)
    }
}

struct LineView: View {
    let line: ChatLine

    var body: some View {
        HStack {
            if line.isQuestion { Spacer(minLength: 40) }
            switch line.content {
            case .text(let text):
                Text(text)
                    .padding(10)
                    .background(line.isQuestion ? Color.accentColor.opacity(0.2) : Color.secondary.opacity(0.15))
                    .clipShape(RoundedRectangle(cornerRadius: 14))
                    .textSelection(.enabled)
                    .accessibilityLabel("\(line.isQuestion ? "You" : "Answer"): \(text)")
            case .picture(let picture, let caption), .sketch(let picture, let caption):
                if let image = PictureFile.image(picture) {
                    Image(decorative: image, scale: 1)
                        .resizable()
                        .scaledToFit()
                        .frame(maxHeight: 220)
                        .clipShape(RoundedRectangle(cornerRadius: 14))
                        .accessibilityLabel(caption)
                }
            }
            if !line.isQuestion { Spacer(minLength: 40) }
        }
    }
}
